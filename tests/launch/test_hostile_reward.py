"""Rewards that loop, exit, raise or eat memory, in runs of launch/train.py: no hang, no wrong number.

A few failures are counted and left out; when too many answers fail the run stops and names the reward.
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


def judge(answer, row, *, crime):
    """Commits the crime on rows that ask for it."""
    if row["guilty"]:
        CRIMES[crime]()
    return float(len(set(answer.lower()) & set("aeiou")) > 2)
'''
KINDS = {"loop": {"timeout"}, "exit": {"crash"}, "fail": {"exception"}, "eat": {"exception", "crash"}}
PROMPTS, SAMPLES = 12, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The reward in a package of the user's own, and prompts of which one in twelve or all are guilty."""
    place = tmp_path_factory.mktemp("hostile")
    (place / "wicked.py").write_text(MODULE)
    for name, guilty in {"few": lambda i: i % PROMPTS == 3, "all": lambda i: True}.items():
        rows = [
            {"prompt": [{"role": "user", "content": f"one two {i}"}], "guilty": guilty(i)}
            for i in range(2 * PROMPTS)
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def train(place, model, run_dir, crime, data):
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
            f"reward.functions=[{{_target_: wicked.judge, crime: {crime}}}]",
            "reward.timeout_s=0.5",
            "reward.memory_mib=256",
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


@pytest.mark.parametrize("crime", KINDS)
def test_a_few_failures_are_counted_and_left_out(crime, place, tiny_model_dir, tmp_path):
    """Two of 24 answers: 8 % with 10 % allowed. What the other 22 are worth stays what it was."""
    done = train(place, tiny_model_dir, tmp_path, crime, "few")
    assert done.returncode == 0, done.stdout + done.stderr
    rollouts = lines(tmp_path, "rollout")
    assert len(rollouts) == 2
    for rollout in rollouts:
        failed = {
            k.rpartition("/")[2]: v for k, v in rollout.items() if k.startswith("reward_failures/") and v
        }
        assert failed.keys() <= KINDS[crime]
        assert sum(failed.values()) == SAMPLES
        assert rollout["reward_failed_share"] == pytest.approx(1 / PROMPTS)
        assert rollout["counted_share"] == pytest.approx(1 - 1 / PROMPTS)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines(tmp_path, "train"))
    assert still_there(tmp_path) == []


def test_how_a_reward_fails_does_not_change_what_is_learnt(place, tiny_model_dir, tmp_path):
    """An answer whose judge died and one whose judge raised are both left out: losses agree bit for bit."""
    curves = []
    for crime in ("exit", "fail"):
        assert train(place, tiny_model_dir, tmp_path / crime, crime, "few").returncode == 0
        curves.append([(line["loss"], line["grad_norm"]) for line in lines(tmp_path / crime, "train")])
    assert curves[0] == curves[1]


@pytest.mark.parametrize("crime", KINDS)
def test_a_run_whose_reward_fails_too_often_stops_and_names_it(crime, place, tiny_model_dir, tmp_path):
    done = train(place, tiny_model_dir, tmp_path, crime, "all")
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "reward judge (wicked.judge) failed on 24 of 24 answers" in said
    assert "reward.max_failed=0.1" in said
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"
    assert lines(tmp_path, "train") == []
    assert still_there(tmp_path) == []
