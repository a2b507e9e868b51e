"""An environment of the user's own, prompts and verifier in one class, from a command to a trained model.

One run goes through; a second is stopped, meets another environment, and ends under another launcher.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
STEPS = 12
MODULE = '''
"""Likes vowels. Notes who asks for its rows."""

from pathlib import Path


class Vowels:
    def __init__(self, size, *, letters="aeiou", held_out=4):
        self.size, self.letters, self.held_out = size, letters, held_out

    def rows(self, split):
        with (Path(__file__).parent / "asked.txt").open("a") as asked:
            print(split, file=asked)
        first, count = (0, self.size) if split == "train" else (1000, self.held_out)
        prompts = [[{"role": "user", "content": f"one two {n}"}] for n in range(first, first + count)]
        return [{"prompt": prompt, "wanted": self.letters} for prompt in prompts]

    def score(self, answer, row):
        return sum(letter in row["wanted"] for letter in answer.lower()) / max(1, len(answer))
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A package of the user's own, and a folder for runs."""
    place = tmp_path_factory.mktemp("environment")
    (place / "my_vowels").mkdir()
    (place / "my_vowels/__init__.py").write_text(MODULE)
    return place


def asked(place):
    """The splits that were asked for since the last look."""
    notes = place / "my_vowels" / "asked.txt"
    found = notes.read_text().split() if notes.exists() else []
    notes.unlink(missing_ok=True)
    return found


def start(place, model, run_dir, launcher=()):
    line = [
        "stage=grpo",
        f"model.path={model}",
        "reward=environment",
        "trusted_packages=[my_vowels]",
        "reward.environment._target_=my_vowels.Vowels",
        "+reward.environment.size=32",
        "reward.environment.only_finished=false",  # a tiny model does not get to the end
        "reward.workers=1",
        "data.cache_dir=cache",
        "data.max_length=64",
        "rollout.max_new_tokens=8",
        "rollout.samples=8",
        "stage.prompts=8",
        "batch.sequences=64",
        "optim.lr=1e-2",
        "precision=fp32",
        f"steps={STEPS}",
        "evaluate.every=100",
        "evaluate.at_start=true",
        "launch.nproc=2",
        "launch.device=cpu",
        "checkpoint.export=false",
        "tracker.every=1",
        f"run_dir={run_dir}",
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(place), str(ROOT)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(TRAIN), *line],
        cwd=place,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process, patience_s=300):
    try:
        said, _ = process.communicate(timeout=patience_s)
    finally:
        process.kill()
    return process.returncode, said


def lines(run_dir, kind):
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def whole(place, tiny_model_dir):
    """The directory of a run that went through, and which splits were asked for on the way."""
    status, said = ended(start(place, tiny_model_dir, "whole"))
    assert status == 0, said
    return place / "whole", asked(place)


def test_an_environment_trains_a_model(whole):
    """Twice the share of vowels in sampled answers, and more than half in greedy ones to held-out prompts."""
    run_dir, _ = whole
    rewards = [line["reward"] for line in lines(run_dir, "rollout")]
    assert len(rewards) == STEPS
    assert rewards[0] < 0.25
    assert rewards[-1] > 2 * rewards[0]
    before, after = (line["environment/score"] for line in lines(run_dir, "eval"))
    assert before < 0.3
    assert after > 0.5
    assert lines(run_dir, "rollout")[0]["reward/environment"] == rewards[0]


def test_its_rows_are_asked_for_once_a_run_whatever_the_ranks(place, whole):
    assert whole[1] == ["train", "held_out"]
    files = sorted((place / "cache" / "environments").iterdir())
    assert [len(file.read_text().splitlines()) for file in files] == [4, 32]  # held-out, train
    assert (place / "whole/config.yaml").read_text().count("environments/") == 0, "the run names no cache"


def test_a_stopped_run_goes_on_with_the_same_rows_or_not_at_all(place, whole, tiny_model_dir):
    """Stopped by Ctrl-C's signal; then the package changes; then it is as it was, and torchrun goes on."""
    run_dir, module = place / "stopped", place / "my_vowels/__init__.py"
    process = start(place, tiny_model_dir, "stopped")
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists() or len(lines(run_dir, "train")) < 3:
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    status, said = ended(process)
    assert status == 3, said
    assert len(lines(run_dir, "train")) < STEPS

    module.write_text(MODULE.replace("one two", "two one"))
    status, said = ended(start(place, tiny_model_dir, "stopped"))
    assert status not in (0, 3), said
    assert "data.environment" in said

    module.write_text(MODULE)
    asked(place)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    status, said = ended(start(place, tiny_model_dir, "stopped", torchrun))
    assert status == 0, said
    assert asked(place) == ["train", "held_out"]
    for kind, names in {"train": ("loss", "grad_norm"), "rollout": ("reward",)}.items():
        for name in names:
            straight, stopped = ([line[name] for line in lines(d, kind)] for d in (whole[0], run_dir))
            assert stopped == straight, name
