"""An environment in the configuration: what is refused before a model is read, what its rows become."""

import json
import os
import re
import shlex
import sys
from types import SimpleNamespace

import pytest

from framework.config import build, environment, record, work
from framework.config.compose import CONF, check, compose
from framework.errors import ConfigError, DataError, UserError

MODULE = '''
import math


class Good:
    """Sums to one number."""

    def __init__(self, size, *, first=0):
        self.size, self.first = size, first

    def rows(self, split):
        first = self.first + (100 if split == "held_out" else 0)
        return ({"prompt": f"{n} + 1 =", "answer": n + 1} for n in range(first, first + self.size))

    def score(self, answer, row):
        return float(answer.strip() == str(row["answer"]))


class Mute:
    def rows(self, split):
        return []


class Rows:
    def __init__(self, kind="empty"):
        self.kind = kind

    def rows(self, split):
        good = [{"prompt": "a"}]
        if split == "train":
            return good
        return {
            "empty": [],
            "not_a_number": [*good, {"prompt": "b", "answer": math.nan}],
            "set": [{"prompt": "b", "answer": {1}}],
            "surrogate": [{"prompt": "\\ud800"}],
            "text": "rows",
            "none": None,
            "mute": [{"question": "b"}],
            "number": [{"prompt": [{"role": "user", "content": 3}]}],
            "long": [{"prompt": "word " * 200}],
        }[self.kind]

    def score(self, answer, row):
        return 0.0


class Breaks(Rows):
    def rows(self, split):
        raise KeyError("no such file")


class Picky(Rows):
    def __init__(self, size):
        if size > 3:
            raise ValueError("size is at most 3")
        super().__init__()


class Asks(Rows):
    def rows(self, split):
        return [{"prompt": "a"}]

    def score(self, answer, model):
        return 0.0


def judge(answer):
    return 1.0
'''
NAME = "reward.environment"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    place = tmp_path_factory.mktemp("package")
    (place / "my_envs.py").write_text(MODULE)
    sys.path.insert(0, str(place))
    yield
    sys.path.remove(str(place))
    sys.modules.pop("my_envs", None)


def run_of(model, cache, name, *more):
    return compose(
        [
            f"model.path={model}",
            "stage=grpo",
            "reward=environment",
            "trusted_packages=[my_envs]",
            f"{NAME}._target_={name if '.' in name else f'my_envs.{name}'}",
            f"data.cache_dir={cache}",
            "data.max_length=64",
            "rollout.max_new_tokens=8",
            *more,
        ]
    )


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("Mute", [], f"{NAME}._target_: my_envs.Mute is a class without score; expected a class with the"),
        ("judge", [], r"is a function; .* 'reward.functions=\[{_target_: my_envs.judge}\]'"),
        ("framework.data.tasks.Family", [], "a class without rows and score"),
        ("Godo", [], f"no Godo in my_envs; type {NAME}._target_=my_envs.Good"),
        ("os.path", [], "expected a function of framework or my_envs"),
        ("Good", [], rf"{NAME}.size: my_envs.Good needs it and it is not set; type \+{NAME}.size=VALUE"),
        ("Good", [f"+{NAME}.sise=3"], rf"my_envs.Good has no such keyword; type \+{NAME}.size"),
        ("Good", [f"+{NAME}.size={{_target_: os.system}}"], "found inside of reward.environment"),
        ("Good", [f"+{NAME}.size=x"], r"Good.rows\('train'\) raised TypeError: .*my_envs.py:\d+"),
        ("Picky", [f"+{NAME}.size=4"], r"my_envs.Picky\(size=4\) raised ValueError: size is at most 3"),
        ("Asks", [], "my_envs.Asks.score needs model; expected a method that takes some of answer, row"),
        ("Breaks", [], r"Breaks.rows\('train'\) raised KeyError: 'no such file' \(.*my_envs.py:\d+"),
        ("Rows", [], r"Rows.rows\('held_out'\) is empty"),
        ("Rows", [f"+{NAME}.kind=not_a_number"], r"rows\('held_out'\)\[1\] cannot be written as JSON"),
        ("Rows", [f"+{NAME}.kind=set"], "cannot be written as JSON"),
        ("Rows", [f"+{NAME}.kind=surrogate"], "cannot be written as JSON"),
        ("Rows", [f"+{NAME}.kind=text"], r"\[0\] is 'r'; expected a mapping with a prompt"),
        ("Rows", [f"+{NAME}.kind=none"], "raised TypeError"),
        ("Rows", [f"+{NAME}.kind=mute"], "has prompt=None"),
        ("Rows", [f"+{NAME}.kind=number"], r"environment-held_out-\w+.jsonl:1"),
        ("Rows", [f"+{NAME}.kind=long"], r"environment-held_out-\w+.jsonl:1"),
    ],
)
def test_what_is_no_environment_is_refused(name, more, told, package, tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match=told):
        build.prepare(run_of(tiny_model_dir, tmp_path, name, *more))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["stage=sft"], "prompts and a verifier in stage sft, which learns from given answers"),
        (["data.train=[{path: a}]"], "sources beside an environment, whose rows are the data"),
        (["data.eval=[{path: a}]"], r"reward=none 'reward.functions=\[{_target_: my.Env}\]'"),
        (["reward=none", "data.train=[]"], r"data.train: got \[\]; expected a list of at least one"),
        ([f"{NAME}.size=3"], rf"no such key; type \+{NAME}.size=3"),
        ([f"{NAME}.only_exct=true"], rf"type {NAME}.only_exact=true, or for a keyword of the class \+{NAME}"),
        ([f"{NAME}={{_target_: my.Env, size: 3}}"], rf"are new to the tree; type '\+{NAME}={{_target_"),
        (["reward=verifier", "data.train=[]", f"+{NAME}.size=3"], f"{NAME}._target_: not set"),
    ],
)
def test_what_does_not_go_with_an_environment_is_refused(argv, told):
    target = [] if argv[0].startswith("reward=") else [f"{NAME}._target_=my.Env"]
    with pytest.raises(ConfigError, match=told):
        compose(["model.path=m", "stage=grpo", "reward=environment", *target, *argv])


def test_questions_that_nothing_judges_are_refused():
    with pytest.raises(ConfigError, match="prompts to answer, and nothing that says what an answer is worth"):
        compose(
            [
                "model.path=m",
                "stage=ppo",
                "reward=model",
                "reward.model=r",
                "data.train=[{path: a}]",
                "data.eval=[{path: b}]",
            ]
        )


def test_an_environment_typed_as_a_whole_needs_no_choice():
    run = compose(
        [
            "model.path=m",
            "stage=ppo",
            "data.train=[]",
            "reward.environment={_target_: my.Env, size: 3, only_exact: true}",
        ]
    )
    assert run.reward.judging == (run.reward.environment,)
    assert run.reward.environment.called == "Env"
    assert run.reward.environment.keywords == {"size": 3}


def test_rows_are_prompts_in_a_file_that_is_named_after_them(package, tiny_model_dir, tmp_path):
    run = run_of(tiny_model_dir, tmp_path, "Good", f"+{NAME}.size=5")
    prepared = build.prepare(run)
    (train,), (questions,) = prepared.tables, prepared.questions
    assert [train.row(n)["answer"] for n in range(len(train))] == [1, 2, 3, 4, 5]
    assert [questions.row(n)["prompt"] for n in range(2)] == ["100 + 1 =", "101 + 1 ="]
    files = {path.name: path for path in (tmp_path / "environments").iterdir()}
    assert len(files) == 2
    assert all(os.stat(path).st_mode & 0o077 == 0 for path in files.values())
    path = next(path for name, path in files.items() if name.startswith("environment-train-"))
    assert json.loads(path.read_text().splitlines()[0]) == {"prompt": "0 + 1 =", "answer": 1}

    other = build.prepare(run_of(tiny_model_dir, tmp_path, "Good", f"+{NAME}.size=5", f"+{NAME}.first=1"))
    assert other.identity["data"] != prepared.identity["data"]
    path.write_text("half a li")  # damaged: written again
    again = build.prepare(run_of(tiny_model_dir, tmp_path, "Good", f"+{NAME}.size=5"))
    assert again.identity == prepared.identity
    assert len(path.read_text().splitlines()) == 5
    assert len(list((tmp_path / "environments").iterdir())) == 4


def test_who_is_told_where_the_rows_are_asks_nobody(package, tiny_model_dir, tmp_path, monkeypatch):
    run = run_of(tiny_model_dir, tmp_path, "Good", f"+{NAME}.size=5")
    prepared = build.prepare(run)
    monkeypatch.setattr(environment, "_made", lambda run: pytest.fail("was asked again"))
    told = record.unpacked(record.packed(run))
    assert build.prepare(told).identity == prepared.identity
    assert "environments" not in record.saved(run), "another start asks again"


def test_machines_with_other_rows_are_refused_on_all_of_them():
    table = SimpleNamespace(name="environment", fingerprint="a")
    others = ("replay", "held_out", "retention", "important", "questions", "retain_questions")
    empty = dict.fromkeys(others, ())
    prepared = SimpleNamespace(tables=[table], **empty)
    same, other = [("environment", "a")], [("environment", "b")]
    work.agree(prepared, SimpleNamespace(gather=lambda mine: [mine, same]))
    with pytest.raises(DataError, match="environment: rank 2 has read other tokens than rank 0"):
        work.agree(prepared, SimpleNamespace(gather=lambda mine: [mine, same, other, same]))


def test_what_the_documentation_says_works(tiny_model_dir, tmp_path, monkeypatch):
    """Its class, and its command word by word up to the model."""
    text = (CONF.parent / "docs/extending.md").read_text()
    (code,) = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL)
    (tmp_path / code[0]).write_text(code[1])
    (line,) = re.findall(r"^PYTHONPATH=\. python launch/train.py (.*?[^\\])$", text, re.DOTALL | re.MULTILINE)
    argv = [word.replace("MODEL", str(tiny_model_dir)) for word in shlex.split(line.replace("\\\n", " "))]
    monkeypatch.syspath_prepend(tmp_path)
    check(argv)
    prepared = build.prepare(compose([*argv, f"data.cache_dir={tmp_path}"]))
    (table,), (questions,) = prepared.tables, prepared.questions
    assert len(table) + len(questions) == 20 * 20
    made = environment._made(prepared.run)
    row = questions.row(0)
    assert row["prompt"][0]["content"] == "1 + 4 ="
    assert (made.score(" 5 ", row), made.score("6", row)) == (1.0, 0.0)
