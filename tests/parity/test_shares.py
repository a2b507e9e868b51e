"""Replay under a budget that moves it: what is asked for, reported and consumed, however a run is spread."""

from collections import Counter

import ledger
import pytest
from ledger import KINDS, REHEARSED, SEQUENCES, STEPS, WEIGHTS

from framework.config import build
from framework.config.compose import compose
from framework.config.consumed import Ledger

USUAL = [
    (1, "ddp", False),
    (2, "ddp", True),
    (2, "fsdp", False),
    (2, "zero3", True),
    (4, "ddp", False),
    (4, "fsdp", True),
    (4, "zero3", False),
]
EVERY = [
    (size, strategy, packed)
    for size in (2, 4)
    for strategy in ("ddp", "fsdp", "zero3")
    for packed in (True, False)
]
CELLS = [*USUAL, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in EVERY if cell not in USUAL)]


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_model_dir):
    """(run directory, ledger) of a run; each is made once."""
    place = ledger.files(tmp_path_factory.mktemp("shares"), tiny_model_dir)
    made = {}

    def line(kind, size=1, strategy="ddp", packed=True):
        run_dir = place / f"{kind}-{size}-{strategy}-{packed}"
        spread = {"strategy": strategy, "launch__nproc": size, "data__packing": str(packed).lower()}
        return run_dir, ledger.line(kind, place, tiny_model_dir, run_dir, **spread)

    def get(*key):
        if key not in made:
            run_dir, arguments = line(*key)
            size = key[1] if len(key) > 1 else 1
            made[key] = run_dir, ledger.run(size, arguments)
        return made[key]

    get.line = line

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "strategy", "packed"), CELLS)
def test_the_same_rows_are_consumed_and_reported_however_a_run_is_spread(kind, size, strategy, packed, train):
    """Step by step: the rows, the trained tokens of each source, and every move of the controller."""
    run_dir, found = train(kind, size, strategy, packed)
    alone, expected = train(kind)
    assert found == expected
    assert ledger.state(run_dir, STEPS)["stage"] == ledger.state(alone, STEPS)["stage"]
    for ours, theirs in zip(ledger.lines(run_dir, "train"), ledger.lines(alone, "train"), strict=True):
        same = {name for name in theirs if name.startswith(("trained_tokens", "sequences", "replay_"))}
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


def test_a_share_is_exact_to_one_example_in_what_is_consumed_and_in_what_is_reported(train):
    """After every step replay is off what its shares so far ask for by less than one example."""
    run_dir, steps = train("sft")
    moves = dict(ledger.state(run_dir, STEPS)["stage"]["shares"])  # by the example from which each counts
    assert len(moves) >= 3
    longest = max(entry.trained for step in steps for entry in step)
    owed, share, turns = 0.0, moves[0], Counter()
    for number, (step, line) in enumerate(zip(steps, ledger.lines(run_dir, "train"), strict=True)):
        share = moves.get(SEQUENCES * number, share)
        assert len(step) == line["sequences"] == SEQUENCES
        trained, examples = Counter(), Counter()
        for entry in step:
            name = ["task", *WEIGHTS][entry.source]
            trained[name] += entry.trained
            examples[name] += 1
        for name in ("task", *WEIGHTS):
            assert line[f"trained_tokens/{name}"] == trained[name]
            assert line[f"sequences/{name}"] == examples[name]
        replayed = sum(trained[name] for name in WEIGHTS)
        owed += share * line["trained_tokens"] - replayed
        assert abs(owed) < longest
        turns += Counter({name: examples[name] for name in WEIGHTS})
        for name, weight in WEIGHTS.items():
            assert abs(turns[name] - turns.total() * weight / sum(WEIGHTS.values())) < 1
    assert turns.total() >= 8


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_a_term_of_replay_takes_its_examples_whatever_its_coefficient(kind, train):
    """So many a step over all ranks, by the weights of the sources, each row once; its coefficient moves."""
    run_dir, steps = train(kind)
    turns, seen = Counter(), Counter()
    for step, line in zip(steps, ledger.lines(run_dir, "train"), strict=True):
        taken = [entry for entry in step if entry.term == "replay"]
        assert len(taken) == line["replay_sequences"] == REHEARSED
        assert line["replay_trained_tokens"] == sum(entry.trained for entry in taken)
        examples = Counter(list(WEIGHTS)[entry.source] for entry in taken)
        assert all(line[f"replay_sequences/{name}"] == examples[name] for name in WEIGHTS)
        turns += examples
        seen += Counter(entry.tokens for entry in taken)
        for name, weight in WEIGHTS.items():
            assert abs(turns[name] - turns.total() * weight / sum(WEIGHTS.values())) < 1
    assert set(seen.values()) == {1}  # 16 of 30 rows and 8 of 11
    amounts = [line["replay/coefficient"] for line in ledger.lines(run_dir, "retain")]
    assert len(set(amounts)) > 2
    assert any(entry.term == "" for step in steps for entry in step)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_of_a_run_names_the_rows_that_were_consumed(kind, train):
    """Beside what the loop saw: every example of text, both answers of every pair, every question asked."""
    key = (kind, 2, "ddp", True) if kind != "dpo" else (kind, 2, "fsdp", False)  # padded: no prompt is shared
    _, steps = train(*key)
    run = compose(train.line(*key)[1])
    prepared = build.prepare(run)
    tables = {table.name: table for table in (*prepared.tables, *prepared.replay)}
    rows = {(name, table.where(row)): row for name, table in tables.items() for row in range(len(table))}
    named, asked = [[] for _ in range(STEPS)], [[] for _ in range(STEPS)]
    for entry in (found := Ledger(run)):
        table, row = tables[entry.source], rows[entry.source, entry.place]
        if kind == "sft" or entry.term == "replay":
            ids, _ = table.example(row)
            number = list(tables).index(entry.source) - len(prepared.tables) * (entry.term == "replay")
            named[entry.step - 1].append((entry.term, number, tuple(ids.tolist())))
        elif kind == "dpo":
            judged = table.judged(row)
            named[entry.step - 1] += [("", 0, (*judged.prompt.tolist(), *ids.tolist())) for ids in judged.ids]
        else:
            asked[entry.step - 1].append(tuple(table.example(row)[0].tolist()))
    seen = [[entry[:3] for entry in step if kind != "ppo" or entry.term == "replay"] for step in steps]
    assert list(map(Counter, named)) == list(map(Counter, seen))
    assert found.steps == STEPS
    if kind == "ppo":
        begins = [step for step in range(STEPS) if asked[step]]
        assert begins[0] == 0
        assert len(begins) > 1
        for first, after in zip(begins, [*begins[1:], STEPS], strict=True):
            answers = [entry.tokens for step in steps[first:after] for entry in step if entry.term == ""]
            for question in asked[first]:
                assert any(tokens[: len(question)] == question for tokens in answers)
            assert all(any(tokens[: len(q)] == q for q in asked[first]) for tokens in answers)
