"""Runs that are killed while a budget moves their replay, and go on in another world: the same rows consumed.

`test_budget_resume` does so through launch/train.py and compares what is reported.
"""

import shutil

import ledger
import pytest
from ledger import KINDS, STEPS

from framework.config.compose import compose
from framework.config.consumed import Ledger

KILLED = 4
WHOLE = (2, "fsdp")
"""Ranks and strategy of the runs that were never stopped."""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir):
    return ledger.files(tmp_path_factory.mktemp("ledger-resume"), tiny_model_dir)


@pytest.fixture(scope="module")
def run(place, tiny_model_dir):
    """The ledger of a run, from its newest checkpoint on."""

    def line(kind, run_dir, size, strategy):
        spread = {"strategy": strategy, "launch__nproc": size}
        kept = {"checkpoint__every": KILLED, "checkpoint__keep": 2}
        return ledger.line(kind, place, tiny_model_dir, run_dir, **spread, **kept)

    def get(kind, run_dir, size, strategy):
        return ledger.run(size, line(kind, run_dir, size, strategy))

    get.line = line
    return get


@pytest.fixture(scope="module")
def whole(place, run):
    """(run directory, ledger) of a run that was never stopped; each is made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = place / f"{kind}-whole", run(kind, place / f"{kind}-whole", *WHOLE)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_the_controller_moves_on_both_sides_of_the_kill(kind, whole):
    run_dir, steps = whole(kind)
    looks = {line["step"]: line for line in ledger.lines(run_dir, "retain")}
    amounts = [looks[step].get("replay/share", looks[step].get("replay/coefficient")) for step in looks]
    assert list(looks) == [0, 2, KILLED, 6, STEPS]
    assert len(set(amounts[1:])) == 4, "a line tells what was replayed until its look: three looks moved it"
    assert len(steps) == STEPS


@pytest.mark.parametrize(("size", "strategy"), [(1, "ddp"), (4, "zero3"), (4, "ddp")])
@pytest.mark.parametrize("kind", KINDS)
def test_another_world_goes_on_with_the_same_rows_and_the_same_moves(
    kind, size, strategy, run, whole, tmp_path
):
    """Killed after the look at the checkpoint had moved the amount, with lines that are yet to be undone."""
    there, expected = whole(kind)
    again = tmp_path / "run"
    shutil.copytree(there, again)
    shutil.rmtree(again / f"checkpoints/step-{STEPS:06d}")
    (again / "result.json").unlink()
    assert run(kind, again, size, strategy) == expected[KILLED:]
    found, wanted = ledger.state(again, STEPS), ledger.state(there, STEPS)
    if kind == "ppo":  # its own part holds sums of rewards and KL, rounded otherwise
        assert found["stage"]["replay"] == wanted["stage"]["replay"]
        assert found["stage"]["scale"] == wanted["stage"]["scale"]
    else:
        assert found["stage"] == wanted["stage"]
    for name in ("trained_tokens", "sequences"):
        ours, theirs = (
            [{k: v for k, v in line.items() if name in k} for line in ledger.lines(where, "train")]
            for where in (again, there)
        )
        assert len(ours) == STEPS
        assert ours == theirs
    books = [
        Ledger(compose(run.line(kind, where, *how)))
        for where, how in ((again, (size, strategy)), (there, WHOLE))
    ]
    ours, theirs = map(list, books)
    assert ours == theirs
    assert books[0].digest == books[1].digest
    assert {row.term for row in ours} == ({""} if kind == "sft" else {"", "replay"})
