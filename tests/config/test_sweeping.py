"""What a sweep goes through, what is asked of it, and how a mistake in that is told."""

import signal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from framework.cluster import records
from framework.config import compose, jobs, space
from framework.config.space import Choice, Interval
from framework.errors import ConfigError

GIVEN = ["-m", "model.path=m", "data.train=[{path: rows.jsonl}]"]


def parse(text):
    return OverridesParser.create().parse_override(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k=1,b,'q r'", Choice(("1", "b", "'q r'"))),
        ("k=choice(1,[x,y])", Choice(("1", "[x,y]"))),
        ("k=4", Choice(("4",))),
        ("k=interval(1,5)", Interval(1.0, 5.0)),
        ("k=int(interval(1,5))", Interval(1, 5, whole=True)),
        ("k=tag(log,interval(1e-6,1e-4))", Interval(1e-6, 1e-4, log=True)),
        ("k=range(1,10,4)", Interval(1.0, 9.0, whole=True, step=4.0)),
        ("k=range(0,1,0.25)", Interval(0.0, 0.75, step=0.25)),
    ],
)
def test_every_form_of_values_is_understood(text, expected):
    found = space.dimension(parse(text))
    assert found == expected
    for value in found.values:  # Hydra's grammar reads back what is handed to it
        assert parse(f"k={value}").is_sweep_override() is False


@pytest.mark.parametrize(
    ("low", "value", "text"),
    [(1e-5, 2.7092722495945806e-05, "2.709e-05"), (1 / 3, 1 / 3, repr(1 / 3)), (0.1, 0.99999, "1.0")],
)
def test_numbers_are_typed_short_but_stay_in_their_interval(low, value, text):
    """Where a third is the lower end, 0.3333 would lie below it."""
    assert Interval(low, 1.0).text(value) == text


def test_a_grid_is_every_combination_and_typed_values_replace_those_of_a_file():
    lines = space.grid(["seed=1,2", "optim.lr=3"], {"optim.lr": "1,2", "steps": "range(1,3)"})
    assert lines == [("optim.lr=3", f"steps={steps}", f"seed={seed}") for steps in (1, 2) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["seed=int(interval(1,4))"], "seed=int(interval(1,4)): an interval; expected a list"),
        (["sweep=optuna", "optim.lr=tag(log,interval(0,1))"], "a logarithm of 0.0; start above 0"),
        (["sweep=optuna", "optim.lr=interval(2,1)"], "type the smaller one first"),
        (["sweep=optuna", "optim.lr=interval(-1,1)"], "optim.lr: got -1.0; expected a number"),
        (["sweep=optuna", "hydra.sweeper.n_trails=3"], "no such key; type hydra.sweeper.n_trials=VALUE"),
        (["sweep=optuna", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials: got 0;"),
        (["sweep=optuna", "hydra.sweeper.n_jobs=2"], "type hydra/launcher=joblib, or hydra.sweeper.n_jobs=1"),
        (
            ["sweep=pareto", "hydra.sweeper.pruner=median"],
            "2 objectives and pruner=median; expected no pruning, for a trial that is behind",
        ),
        (["hydra/launcher=slurm"], "expected one of basic, joblib, submitit_local, submitit_slurm"),
        (["hydra/sweeper=search"], "hydra.sweeper.n_trials: not set; type sweep=optuna"),
        (["launch.nnodes=2", "launch.master_addr=h", "launch.master_port=1"], "hydra.launcher.nodes=2"),
    ],
)
def test_a_mistake_is_told_with_what_to_type(argv, told):
    with pytest.raises(ConfigError) as refused:
        compose.check([*GIVEN, *argv])
    assert told in str(refused.value)


def test_both_ends_of_an_interval_are_checked():
    compose.check([*GIVEN, "sweep=optuna", "optim.weight_decay=interval(0,0.1)"])
    with pytest.raises(ConfigError, match=r"adapter\.dropout"):
        compose.check([*GIVEN, "sweep=optuna", "adapter=lora", "adapter.dropout=interval(0,1.5)"])


def test_a_sweeps_directory_follows_from_what_is_searched_not_from_how_much():
    where = compose.sweep_dir(["sweep=optuna", "seed=1"])
    assert compose.sweep_dir(["hydra.sweeper.n_trials=99", "seed=1", "sweep=optuna"]) == where
    assert compose.sweep_dir(["sweep=optuna", "seed=1", "hydra.sweeper.params.seed=2"]) != where


def test_a_record_is_found_again_whatever_watches_the_job():
    name = jobs.name(["seed=1", "optim.lr=1"])
    assert jobs.name(["optim.lr=1", "tracker=wandb", "seed=1", "hydra.x=1"]) == name
    assert jobs.name(["seed=1", "optim.lr=2"]) != name


OUTCOMES = {
    "done": (0, {"status": 0}, {}, records.DONE),
    "crashed": (1, {"status": 1, "error": "E"}, {}, records.FAILED),
    "crashed while a stop was asked for": (1, {"status": 1, "error": "E"}, {"stopped": True}, records.FAILED),
    "a rank was killed": (1, {"status": 1, "ended_by": signal.SIGKILL}, {}, records.KILLED),
    "a rank broke": (1, {"status": 1, "ended_by": signal.SIGSEGV}, {}, records.FAILED),
    "the launcher was killed": (137, {}, {}, records.KILLED),
    "ended before it had begun": (130, {}, {"stopped": True}, records.INTERRUPTED),
    "stopped with a checkpoint": (3, {"status": 3}, {"stopped": True}, records.INTERRUPTED),
    "stopped by somebody else": (3, {"status": 3}, {}, records.INTERRUPTED),
    "ended by force": (143, {"status": 143}, {"stopped": True}, records.INTERRUPTED),
    "hopeless": (3, {"status": 3}, {"pruned": True}, records.PRUNED),
    "hopeless, and done all the same": (0, {"status": 0}, {"pruned": True}, records.DONE),
    "refused": (2, {"status": 2, "error": "E"}, {}, records.REFUSED),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_what_a_job_leaves_comes_to_a_verdict(case):
    status, said, asked, expected = OUTCOMES[case]
    found = jobs.verdict(status, said, **({"pruned": False, "stopped": False} | asked))
    assert found["status"] == expected
    assert found["error"] == said.get("error") or expected == records.KILLED
