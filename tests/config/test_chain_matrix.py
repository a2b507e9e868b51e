"""The step that makes the matrix: what a task may say, whose functions may score, what comes out."""

import json
import math

import pytest
import torch

from framework.config import compare
from framework.config.chain import matrix, told
from framework.data.sources import Source
from framework.data.tables import prepare
from framework.errors import ConfigError
from framework.models import answering

ROWS = [{"prompt": f"one two {i}", "completion": " three"} for i in range(6)]
ANY = {"score": "framework.rollout.rewards.regex", "options": {"pattern": ""}}  # right wherever it ends


@pytest.fixture
def run(tmp_path, tiny_model_dir):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def made(task=None, trusted=(), name="task", **more):
        given = {
            "models": {"start": str(tiny_model_dir), "task": str(tiny_model_dir)},
            "max_new_tokens": 4,
            **more,
        }
        return matrix(tmp_path, trusted, tasks={name: {"path": str(path), **(task or {})}}, **given)["chain"]

    made.path = path
    return made


def test_what_no_function_scores_is_known_by_its_likelihood(run, tmp_path, tiny_model_dir, capsys):
    chain = run()
    lm, tokenizer = answering.load(str(tiny_model_dir), dtype=torch.bfloat16)
    (table,) = prepare(
        [Source(str(run.path))], tokenizer=tokenizer, max_length=64, cache_dir=tmp_path / "own"
    )
    expected = compare.loss(lm, table)
    task = chain["tasks"]["task"]
    assert task["losses"] == pytest.approx([expected] * 2)
    assert task["scores"] == pytest.approx([math.exp(-expected)] * 2)
    assert chain["means"] == {
        "likelihood": {
            "accuracy": task["scores"][1],
            "learning_accuracy": task["scores"][1],
            "backward_transfer": None,
            "forgetting": None,
        }
    }
    assert json.loads((tmp_path / "matrix.json").read_text()) == chain
    assert told(chain) in capsys.readouterr().err


def test_what_no_stage_teaches_is_in_the_matrix_and_in_no_mean(run):
    """As general text: the incoming model's column is the one that counts."""
    chain = run({"learnt": "start"}, name="general")
    general = chain["tasks"]["general"]
    assert general["forgetting"] == 0.0  # the same model twice
    assert (general["learnt"], general["rows"], chain["means"]) == ("start", 6, {})
    score = f"{general['scores'][0]:.3f}"
    assert told(chain).splitlines()[-1].split() == [
        "general",
        f"*{score}",
        score,
        "+0.000",
        "6",
        "likelihood",
    ]


def test_a_terminal_reads_what_each_number_is():
    """Two tasks over two stages: the first falls from .75 to .5, the second is learnt last."""
    tasks = {
        "a": {
            "learnt": "a",
            "measure": "accuracy",
            "scores": [0.0, 0.75, 0.5],
            "forgetting": 0.25,
            "rows": 8,
        },
        "b": {
            "learnt": "b",
            "measure": "accuracy",
            "scores": [0.1, 0.1, 1.0],
            "forgetting": None,
            "rows": 12,
        },
    }
    means = {"accuracy": 0.75, "learning_accuracy": 0.875, "backward_transfer": -0.25, "forgetting": 0.25}
    text = told({"stages": ["start", "a", "b"], "tasks": tasks, "means": {"accuracy": means}})
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["start", "a", "b", "forgetting", "rows", "of"],
        ["a", "0.000", "*0.750", "0.500", "+0.250", "8", "accuracy"],
        ["b", "0.100", "0.100", "*1.000", "12", "accuracy"],
    ]
    assert text.splitlines()[4] == (
        "mean accuracy at the end 0.750 (ACC), when learnt 0.875 (LA), since learnt -0.250 (BWT), "
        "forgotten +0.250 (F)"
    )


def test_an_answer_that_did_not_end_is_not_right(run):
    """An untrained model of 400 tokens says no end within four of them."""
    task = run(ANY)["tasks"]["task"]
    assert task["scores"] == [0.0, 0.0]
    assert task["rows"] == 6
    assert task["intervals"][0][1] == pytest.approx(0.39, abs=0.01)  # Wilson's of none of 6: z^2 / (n + z^2)
    assert task["flips"] == {"start": {"lost": 0.0, "gained": 0.0}}


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        ({"chance": 1.0}, "task", "tasks.task.chance: Input should be less than 1"),
        ({"scores": "x"}, "task", "tasks.task.scores: Extra inputs are not permitted; expected path, score"),
        ({}, "other", "tasks.other.learnt: other is none of models; expected one of start, task, the first"),
        ({"score": "mine.score"}, "task", "found mine.score; expected a function of framework"),
        ({"score": "framework.rollout.rewards.exakt"}, "task", "no exakt in framework.rollout.rewards"),
        ({**ANY, "options": {"patern": ""}}, "task", "tasks.task.score.patern"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_refused_before_a_model_is_read(run, task, name, message):
    with pytest.raises(ConfigError) as refused:
        run(task, name=name, models={"start": "no/such", "task": "no/such"})
    assert message in str(refused.value)


def test_a_score_of_the_users_own_and_what_it_raises(run, tmp_path, monkeypatch):
    """Named as trusted; it fails on a row without what it reads, and says which."""
    (tmp_path / "mine_alone.py").write_text(
        "def ended(answer, row):\n    return 1.0\n\ndef lacking(answer, row):\n    return row['gold']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("framework.config.chain.complete", lambda *_, **__: [ENDED] * len(ROWS))
    assert run({"score": "mine_alone.ended"}, ["mine_alone"])["tasks"]["task"]["scores"] == [1.0, 1.0]
    with pytest.raises(
        ConfigError, match=r"tasks.task.score: KeyError of 'three': 'gold'; expected .* a row with prompt"
    ):
        run({"score": "mine_alone.lacking"}, ["mine_alone"])


class ENDED:
    text, finished = "three", True
