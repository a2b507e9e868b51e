"""Rewards that loop, exit, raise or eat memory, in runs of launch/train.py: no hang, no wrong number.

A few failures are counted and left out; when too many answers fail the run stops and names the reward. A
run's rows commit all four crimes, side by side in the same rollout.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
MODULE = '''
import os


def loop():
    while True:
        pass


def eat():
    held = []
    while True:
        held.append(bytearray(16 << 20))


def fail():
    raise RuntimeError("no such luck")


CRIMES = {"loop": loop, "exit": lambda: os._exit(0), "eat": eat, "fail": fail}


def judge(answer, row, *, only=None):
    """Commits the row's crime, if any, or `only` in its place."""
    if row["crime"]:
        CRIMES[only or row["crime"]]()
    return float(len(set(answer.lower()) & set("aeiou")) > 2)
'''
CRIMES = ("loop", "exit", "eat", "fail")
ENDS = {"timeout", "crash", "exception"}  # of a call: by its time, by its process' death, by what it raised
PROMPTS, SAMPLES = 48, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The reward in a package of the user's own, and prompts of which one in twelve or all are guilty."""
    place = tmp_path_factory.mktemp("hostile")
    (place / "wicked.py").write_text(MODULE)
    for name, every in {"few": 12, "all": 1}.items():
        rows = [
            {
                "prompt": [{"role": "user", "content": f"one two {i}"}],
                "crime": None if i % every else CRIMES[i // every % len(CRIMES)],
            }
            for i in range(2 * PROMPTS)
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def train(place, model, run_dir, data, *settings):
    return subprocess.run(
        [
            sys.executable,
            str(TRAIN),
            "stage=grpo",
            f"model.path={model}",
            f"data.train=[{{path: {place}/{data}.jsonl}}]",
            f"data.cache_dir={place}/cache",
            "data.shuffle=false",
            "data.max_length=64",
            "trusted_packages=[wicked]",
            "reward.functions=[{_target_: wicked.judge}]",
            "reward.timeout_s=1",
            "reward.memory_mib=64",  # soon eaten, also beside other tests
            "reward.workers=1",
            f"stage.prompts={PROMPTS}",
            f"rollout.samples={SAMPLES}",
            "rollout.max_new_tokens=8",
            f"batch.sequences={PROMPTS * SAMPLES}",
            "precision=fp32",
            "steps=2",
            "launch.nproc=2",
            "launch.device=cpu",
            "checkpoint.export=false",
            "tracker.report=false",
            "tracker.every=1",
            f"run_dir={run_dir}",
            *settings,
        ],
        env={**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def lines(run_dir, kind):
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def still_there(run_dir, patience_s=10.0):
    """Processes of the run or its rewards that outlive it."""

    def found():
        commands = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    links = [os.readlink(link) for link in (entry / "fd").iterdir()]
                except OSError:
                    continue
                if any(str(run_dir) in link for link in links):
                    commands.append((entry / "cmdline").read_bytes())
        return commands

    deadline = time.monotonic() + patience_s
    while (left := found()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.fixture(scope="module")
def few(place, tiny_model_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("few")
    done = train(place, tiny_model_dir, run_dir, "few")
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_a_few_failures_are_counted_and_left_out(few):
    """Eight of 96 answers, two by each crime, with 10 % allowed."""
    rollouts = lines(few, "rollout")
    assert len(rollouts) == 2
    for rollout in rollouts:
        failed = {
            k.rpartition("/")[2]: v for k, v in rollout.items() if k.startswith("reward_failures/") and v
        }
        assert failed.keys() == ENDS
        assert failed["timeout"] == SAMPLES
        assert sum(failed.values()) == len(CRIMES) * SAMPLES
        assert rollout["reward_failed_share"] == pytest.approx(1 / 12)
        assert rollout["counted_share"] == pytest.approx(1 - 1 / 12)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines(few, "train"))
    assert still_there(few) == []


def test_how_a_reward_fails_does_not_change_what_is_learnt(few, place, tiny_model_dir, tmp_path):
    """An answer whose judge died and one whose judge raised are both left out: losses agree bit for bit."""
    raising = "reward.functions=[{_target_: wicked.judge, only: fail}]"
    assert train(place, tiny_model_dir, tmp_path, "few", raising).returncode == 0
    curves = [[(line["loss"], line["grad_norm"]) for line in lines(run, "train")] for run in (few, tmp_path)]
    assert curves[0] == curves[1]


def test_a_run_whose_reward_fails_too_often_stops_and_names_it(place, tiny_model_dir, tmp_path):
    done = train(place, tiny_model_dir, tmp_path, "all", "stage.prompts=12", "batch.sequences=24")
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "reward judge (wicked.judge) failed on 24 of 24 answers" in said
    assert "reward.max_failed=0.1" in said
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"
    assert lines(tmp_path, "train") == []
    assert still_there(tmp_path) == []
