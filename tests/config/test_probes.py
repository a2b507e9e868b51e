"""What is watched, how often and at what cost, decided before a weight is read."""

import json

import pytest

from framework.config import build
from framework.config.compose import compose
from framework.errors import ConfigError, DataError

EXAMPLES = [{"prompt": f"one two {'three ' * (i % 7)}", "completion": f"four {i}"} for i in range(40)]


@pytest.fixture
def prepare(tmp_path, tiny_model_dir):
    """Prepared run of some overrides; `files` name -> rows."""

    def prepared(*more, **files):
        for name, rows in {"task": EXAMPLES, **files}.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = [f"model.path={tiny_model_dir}", f"data.train=[{{path: {tmp_path}/task.jsonl}}]"]
        given += [f"data.cache_dir={tmp_path}/cache", "data.max_length=512", "batch.sequences=8"]
        return build.prepare(compose([*given, "steps=1000", *more])).probes

    prepared.at = tmp_path
    return prepared


def source(prepare, name):
    return f"{{path: {prepare.at}/{name}.jsonl, name: {name}}}"


GENERAL = [{"text": f"General text number {i} of many, about nothing."} for i in range(30)]


def test_every_run_watches_the_built_in_texts(prepare):
    probes = prepare()
    assert [stratum.name for stratum in probes.strata] == [
        "chat", "prose", "code", "facts", "instructions", "arithmetic"]  # fmt: skip
    assert probes.cadence.due(0)
    assert probes.cadence.due(1000)
    assert "retention is measured on chat" in probes.told()


def test_watching_stays_within_its_share_of_the_computation(prepare):
    """Long runs see more rows and more looks; none costs more than asked for once the least is affordable."""
    looks, rows = [], []
    for steps in (10_000, 100_000, 1_000_000):
        probes = prepare(f"steps={steps}", "retain.cost=0.02")
        assert probes.cost <= 0.02
        looks.append(probes.cadence.looks())
        rows.append(len(probes.strata[0].rows))
        early = sum(probes.cadence.due(step) for step in range(steps // 10))
    assert looks == sorted(looks)
    assert rows == sorted(rows)
    assert rows[-1] > 20  # of 24, those that fit
    assert 10 <= early <= 30


def test_a_short_run_is_looked_at_twice_and_says_what_that_costs(prepare):
    probes = prepare("steps=4")
    assert probes.cadence.looks() == 2
    assert {len(stratum.rows) for stratum in probes.strata} == {8}
    assert probes.cost > 0.01
    assert f"{probes.cost:.2g} of the computation" in probes.told()


def test_the_users_sources_join_and_replace(prepare):
    probes = prepare(
        f"evaluate.retention=[{source(prepare, 'own')},{source(prepare, 'chat')}]",
        own=GENERAL,
        chat=GENERAL[:9],
    )
    by_name = {stratum.name: stratum for stratum in probes.strata}
    assert set(by_name) == {"own", "chat", "prose", "code", "facts", "instructions", "arithmetic"}
    assert by_name["chat"].table.name == "chat"
    assert len(by_name["chat"].table) == 9
    assert probes.budgeted == ("own", "chat")


def test_nothing_is_watched_where_that_was_asked_for(prepare):
    assert prepare("retain=none") is None


def test_rows_that_do_not_fit_are_left_out_and_counted(prepare):
    probes = prepare("data.max_length=60")
    assert probes.left_out["over-long"] > 50 or "over-long or not to be rendered" in probes.left_out
    assert "left out" in probes.told()


def test_a_row_of_the_users_that_is_trained_on_is_refused_with_both_places(prepare):
    with pytest.raises(DataError, match=r"own\.jsonl:2: .*trained on, too, as .*task\.jsonl:4"):
        prepare(
            f"evaluate.retention=[{source(prepare, 'own')}]",
            own=[EXAMPLES[3] | {"completion": "five"}, EXAMPLES[3]],
        )


def test_a_row_that_is_replayed_is_refused_too(prepare):
    with pytest.raises(DataError, match=r"own\.jsonl:1: .*again\.jsonl:3"):
        prepare(
            f"evaluate.retention=[{source(prepare, 'own')}]",
            "replay=fixed",
            f"replay.sources=[{source(prepare, 'again')}]",
            own=[{"text": "general TEXT number 7 of many; about nothing"}],
            again=GENERAL[5:8],
        )


def test_a_built_in_row_that_is_trained_on_is_left_out(prepare):
    from framework.data import probing

    probes = prepare(task=[*probing.arithmetic()[:2]])
    assert probes.left_out["trained on"] == 2
    assert {0, 1}.isdisjoint(next(s for s in probes.strata if s.name == "arithmetic").rows)


def test_a_budget_looks_often_and_at_all_rows_whatever_that_costs(prepare):
    probes = prepare(
        "steps=120",
        f"evaluate.retention=[{source(prepare, 'own')}]",
        "replay=budget",
        f"replay.sources=[{source(prepare, 'again')}]",
        own=GENERAL,
        again=[{"text": "Something else."}],
    )
    assert probes.cadence.looks() >= 40
    assert len(next(s for s in probes.strata if s.name == "own").rows) == 30


def test_a_budget_on_text_that_nobody_watches_is_refused(prepare):
    with pytest.raises(ConfigError, match=r"replay.strata: no text of the name chta.*'replay.strata=\["):
        prepare(
            "replay=budget",
            f"replay.sources=[{source(prepare, 'again')}]",
            "replay.strata=[chta]",
            again=GENERAL,
        )


def test_budgets_of_kinds_that_nobody_watches_are_refused_with_the_nearest(prepare):
    sources = ["replay=budget", f"replay.sources=[{source(prepare, 'again')}]"]
    with pytest.raises(ConfigError, match=r"no text of the name chta.*'replay.max_forgetting={chat: 0.02}'"):
        prepare(*sources, "replay.max_forgetting={chta: 0.02, code: 0.05}", again=GENERAL)
    probes = prepare(*sources, "replay.max_forgetting={code: 0.05, chat: 0.02}", again=GENERAL)
    assert probes.budgeted == ("code", "chat")


QUESTIONS = [{"prompt": f"What is {i} and one?", "answer": str(i + 1)} for i in range(100)]


def asking(prepare, *more, again=GENERAL):
    """Probes of a run with 100 questions named sums and a budget of accuracy."""
    given = ["replay=budget", f"replay.sources=[{source(prepare, 'again')}]", "replay.unit=accuracy"]
    given += [f"retain.prompts=[{source(prepare, 'sums')}]", "reward=verifier"]
    return prepare(*given, *more, again=again, sums=QUESTIONS)


def test_questions_are_bound_by_a_budget_of_accuracy_and_nothing_else_is(prepare):
    probes = asking(prepare, "replay.max_forgetting=0.05")
    assert (probes.budgeted, probes.asked, probes.doubts) == (("sums",), {"sums": 100}, ())
    assert "besides by answers to the questions sums 100: at most" in probes.told()
    often = asking(prepare, "replay.max_forgetting=0.05", "retain.ask_every=1")
    assert often.answering > 2 * probes.answering > 0
    assert often.cost == probes.cost
    with pytest.raises(ConfigError, match=r"no questions of the name smus.*{sums: 0.1}"):
        asking(prepare, "replay.max_forgetting={smus: 0.1}")
    with pytest.raises(
        ConfigError, match=r"no questions of the name chat are asked.*'replay.strata=\[sums\]'"
    ):
        asking(prepare, "replay.strata=[chat]")
    assert asking(prepare, "retain.builtin=false", "replay.max_forgetting=0.05").strata == ()


def test_a_question_that_is_trained_on_is_refused(prepare):
    known = [{"prompt": QUESTIONS[3]["prompt"], "completion": " 4"}]
    with pytest.raises(DataError, match=r"sums\.jsonl:4: .*trained on, too, as .*again\.jsonl:1"):
        asking(prepare, "replay.max_forgetting=0.05", again=known)


def test_questions_that_are_too_few_for_a_budget_are_named_before_anything_is_loaded(prepare):
    """z^2 / (100 + z^2) = 0.036993 stays open; 0.01 needs z^2 99 = 380.3 of them."""
    (doubt,) = asking(prepare, "replay.max_forgetting={sums: 0.01}").doubts
    assert doubt.startswith("a budget of 1 points of accuracy cannot be resolved on sums: its 100 questions")
    assert "expected 381 at least" in doubt
    assert "type replay.max_forgetting=0.037" in doubt


def test_when_questions_are_asked_decides_a_run_that_they_steer():
    given = ["model.path=m", "data.train=[{path: t.jsonl}]", "replay.sources=[{path: g.jsonl}]"]
    given += ["retain.prompts=[{path: q.jsonl}]", "reward=verifier", "replay=budget"]
    steered = [compose([*given, f"retain.ask_every={n}"]).identity() for n in (1, 2)]
    assert steered[0] != steered[1]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["replay.most=0.05"], "replay.fraction=0.1 replay.most=0.5"),
        (["replay.most=1.5"], "replay.fraction=0.1 replay.most=0.5"),
        (["replay.most=null"], "replay.fraction=0.1 replay.most=0.5"),
        (["replay.fraction=0"], "replay.fraction=0.1 replay.most=0.1"),
        (["retain=none"], "type retain=default"),
        (["replay.max_forgetting=null"], "replay.max_forgetting=0.01 or replay.most=null"),
    ],
)
def test_budgets_that_make_no_sense_are_refused_with_what_to_type(more, told):
    given = [
        "model.path=m",
        "data.train=[{path: t.jsonl}]",
        "replay=budget",
        "replay.sources=[{path: g.jsonl}]",
    ]
    with pytest.raises(ConfigError) as refused:
        compose([*given, *more])
    assert told in str(refused.value)


def test_what_is_watched_decides_a_run_only_where_there_is_a_budget():
    given = ["model.path=m", "data.train=[{path: t.jsonl}]", "replay.sources=[{path: g.jsonl}]"]
    fixed = [compose([*given, "replay=fixed", f"retain.every={n}"]).identity() for n in (5, 9)]
    assert fixed[0] == fixed[1]
    steered = [compose([*given, "replay=budget", f"retain.every={n}"]).identity() for n in (5, 9)]
    assert steered[0] != steered[1]
