"""A run whose replay is being steered, killed in the middle of a move: the same shares, the same examples."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS, KILLED = 16, 8


def rows(kind, count):
    return [
        {"prompt": f"{kind} {'one ' * (i % 5)}{i}", "completion": f" {'two ' * (i * 3 % 7)}{i}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_model_dir):
    place = tmp_path_factory.mktemp("steered")
    for name, count in {"task": 60, "general": 30, "watched": 12}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(name, count)))
    return [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        f"model.path={tiny_model_dir}",
        f"data.train=[{{path: {place}/task.jsonl}}]",
        "replay=budget",
        f"replay.sources=[{{path: {place}/general.jsonl}}]",
        f"evaluate.retention=[{{path: {place}/watched.jsonl, name: watched}}]",
        "replay.max_forgetting=0.02",
        "replay.fraction=0.45",  # five looks away from nothing, the fourth of them at the checkpoint
        "retain=none",
        "retain.every=2",
        f"data.cache_dir={place}/cache",
        "data.max_length=128",
        "batch.sequences=8",
        "batch.tokens_per_micro=256",
        "precision=fp32",
        "launch.device=cpu",
        f"steps={STEPS}",
        f"checkpoint.every={KILLED}",
        "checkpoint.keep=2",
        "checkpoint.export=false",
        "tracker.report=false",
    ]


def run(command, run_dir, *more):
    told = subprocess.run(
        [*command, f"run_dir={run_dir}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    print(told.stdout)
    assert told.returncode == 0


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(command, run_dir, "launch.nproc=1")
    return run_dir


def lines(run_dir, kind):
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def state(run_dir):
    """What the last checkpoint says of replay and of the controller."""
    manifest = json.loads((run_dir / f"checkpoints/step-{STEPS:06d}/manifest.json").read_text())
    return manifest["state"]


def killed(whole, run_dir):
    """The directory as it was when the run died after its first checkpoint."""
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / f"checkpoints/step-{STEPS:06d}")
    (run_dir / "result.json").unlink()
    return run_dir


def test_shares_move_on_both_sides_of_the_checkpoint(whole):
    moves = [line["step"] for line in lines(whole, "event") if "the replay share goes" in line["message"]]
    assert [step for step in moves if step <= KILLED]
    assert [step for step in moves if step > KILLED]
    assert len(state(whole)["stage"]["shares"]) == len(moves) + 1


def test_the_same_world_goes_on_bit_for_bit(command, whole, tmp_path):
    again = killed(whole, tmp_path / "run")
    run(command, again, "launch.nproc=1")
    times = ("seconds", "tokens_per_s", "tflops", "peak_memory_bytes")
    for kind in ("train", "retain", "eval"):
        for ours, theirs in zip(lines(again, kind), lines(whole, kind), strict=True):
            assert {k: v for k, v in ours.items() if k not in times} == {
                k: v for k, v in theirs.items() if k not in times
            }
    assert state(again)["stage"] == state(whole)["stage"]
    assert state(again)["watch"] == state(whole)["watch"]


def test_two_ranks_go_on_with_the_same_shares_and_examples(command, whole, tmp_path):
    again = killed(whole, tmp_path / "run")
    run(command, again, "launch.nproc=2", "strategy=fsdp")
    assert state(again)["stage"] == state(whole)["stage"]  # the position, and every share with its index
    for ours, theirs in zip(lines(again, "train"), lines(whole, "train"), strict=True):
        for name in ("step", "data_index", "tokens", "trained_tokens/task", "trained_tokens/general"):
            assert ours[name] == theirs[name], name
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    for ours, theirs in zip(lines(again, "retain"), lines(whole, "retain"), strict=True):
        assert ours["replay/share"] == theirs["replay/share"]
        assert ours["watched/change"] == pytest.approx(theirs["watched/change"], abs=1e-5)
    assert [line["message"] for line in lines(again, "event") if "goes" in line["message"]] == [
        line["message"] for line in lines(whole, "event") if "goes" in line["message"]
    ]
