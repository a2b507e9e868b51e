"""The command `launch/pipeline.py` with a real chain: rows written, a model trained twice, killed between.

One chain is run through by the module's fixtures, each test looks at what it left.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from framework.config import pipeline
from framework.track import jsonl

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = ROOT / "launch" / "pipeline.py"
STEPS = 150  # of the second training: some seconds, so that a signal meets it in the middle

CHAIN = """
stages:
  rows:
    _target_: own_steps.rows
    count: 40
  first:
    model.path: MODEL
    data.train: [{path: "${stages.rows.run_dir}/rows.jsonl"}]
    steps: 5
  second:
    model.path: ${stages.first.model}
    data: {train: [{path: "${stages.rows.run_dir}/rows.jsonl"}]}
    steps: STEPS
"""
OWN_STEP = """
import json

def rows(directory, *, count: int, seed: int):
    lines = [{"prompt": "one two " + "three " * (i % 5), "completion": "four five"} for i in range(count)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    return {"facts": {"seed": seed}}
"""
COMMON = [
    "data.max_length=64",
    "batch.sequences=4",
    "batch.tokens_per_micro=256",
    "schedule=constant",
    "optim.lr=1e-3",
    "precision=fp32",
    "evaluate.every=1000",
    "evaluate.at_start=true",
    "evaluate.samples=0",
    "launch.device=cpu",
    "tracker.console=none",
]


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_model_dir):
    """What follows `launch/pipeline.py`: the chain of a user's own directory, with a step of their own."""
    place = tmp_path_factory.mktemp("pipeline")
    (place / "own_steps.py").write_text(OWN_STEP)
    (place / "held_out.jsonl").write_text('{"prompt": "one two three", "completion": "four five"}\n')
    own = place / "conf" / "pipeline"
    own.mkdir(parents=True)
    (own / "chain.yaml").write_text(CHAIN.replace("MODEL", str(tiny_model_dir)).replace("STEPS", str(STEPS)))
    sys.path.insert(0, str(place))
    yield [
        f"--config-dir={place}/conf",
        "experiment=chain",
        "trusted_packages=[own_steps]",
        "seed=7",
        f"run_dir={place}/runs/chain",
        *COMMON,
        f"data.eval=[{{path: {place}/held_out.jsonl, name: same}}]",
        f"data.cache_dir={place}/cache",
    ]
    sys.path.remove(str(place))


def start(command):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, str(PIPELINE), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join([sys.path[0], str(ROOT)])},
    )


def where(command):
    return {step.name: step.directory for step in pipeline.check(command).steps}


@pytest.fixture(scope="module")
def places(command):
    """The directory of each step."""
    return where(command)


def result(directory):
    return json.loads((directory / "result.json").read_text())


def train_steps(directory):
    return [line["step"] for line in jsonl.read(directory / "metrics.jsonl") if line["kind"] == "train"]


@pytest.fixture(scope="module")
def killed(command, places):
    """The chain, stopped by Ctrl-C's signal in the middle of its second training."""
    process = start(command)
    try:
        metrics = places["second"] / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return {
        "status": process.returncode,
        "err": err,
        "steps": train_steps(places["second"]),
        "result": result(places["first"].parent),
        "first": (places["first"] / "result.json").stat().st_mtime_ns,
    }


@pytest.fixture(scope="module")
def finished(command, killed):
    """The same command again, after the stop."""
    process = start(command)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def test_a_stop_saves_the_stage_and_ends_the_chain(killed):
    assert killed["status"] == 3, killed["err"]
    assert killed["result"] == {"status": "interrupted", "stage": "second", "exit_status": 3}
    assert "SIGINT: saving after this step" in killed["err"]
    assert "once more" in killed["err"]
    assert "ended by force" not in killed["err"], "the child got the signal once"
    assert 0 < len(killed["steps"]) < STEPS


def test_the_same_command_goes_on_and_does_nothing_twice(places, killed, finished):
    assert "[1/3] rows: done before" in finished
    assert "[2/3] first: done before" in finished
    assert "goes on from its last checkpoint" in finished
    assert (places["first"] / "result.json").stat().st_mtime_ns == killed["first"]
    assert train_steps(places["second"]) == list(range(1, STEPS + 1))
    whole = result(places["second"].parent)
    assert whole["status"] == "done"
    assert {name: stage["status"] for name, stage in whole["stages"].items()} == dict.fromkeys(places, "done")


def test_each_stage_begins_where_the_last_one_ended(places, finished):
    """The held-out loss before the second training is the one after the first, to fp32."""
    evals = {
        name: [
            line["same/loss"] for line in jsonl.read(places[name] / "metrics.jsonl") if line["kind"] == "eval"
        ]
        for name in ("first", "second")
    }
    assert evals["first"][-1] < evals["first"][0]
    assert evals["second"][0] == pytest.approx(evals["first"][-1], rel=1e-5)
    kept = yaml.safe_load((places["second"] / "config.yaml").read_text())
    assert kept["model"]["path"] == str(places["first"] / "model")


def test_a_done_chain_is_not_started_again_and_shows_its_road(command, places, finished):
    again = start(command)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0
    assert err.count("done before") == 3
    page = (places["first"].parent / "report.html").read_text()
    for text in (
        "3 of 3 steps done",
        "<td>seed</td><td>7</td>",
        "first same",
        "launch/train.py",
        "schedule=constant",
    ):
        assert text in page, text


def test_a_changed_step_is_done_anew_beside_the_old_one(command, places, finished):
    """Only what depends on the change moves; the difference is told."""
    chain = pipeline.check([*command, "stages.second.optim.lr=5e-4"])
    spec = importlib.util.spec_from_file_location("pipeline_command", PIPELINE)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert [program.done(step) for step in chain.steps] == [True, True, False]
    told = program.changes(chain, chain.steps[-1])
    assert told == [
        f"other settings than {places['second']}, which stays:",
        "  optim.lr: 0.001 -> 0.0005",
    ]


def test_a_mistake_in_the_last_step_is_refused_before_the_first_starts(command, tmp_path):
    mine = [text for text in command if not text.startswith("run_dir=")]
    process = start([*mine, f"run_dir={tmp_path}/new", "stages.second.optim.lrr=1"])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err == "error: stages.second: optim.lrr=1: no such key; type optim.lr=1\n"
    assert list(tmp_path.iterdir()) == []
