"""A coefficient that is found while training, across a stop: losses, norms and coefficients bit for bit."""

import json
import random

import pytest

from framework.config.compose import compose
from framework.config.work import work

WORDS = "the capital of France is Paris one two three four five words list story".split()


def write(place):
    draw = random.Random(0)

    def say():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))

    pairs = [{"prompt": say(), "chosen": say(), "rejected": say() + " no"} for _ in range(30)]
    general = [{"prompt": say(), "completion": say()} for _ in range(30)]
    for name, rows in (("pairs", pairs), ("general", general)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(place, model, name, *more):
    settings = {
        "run_dir": place / name,
        "model.path": model,
        "data.train": f"[{{path: {place}/pairs.jsonl}}]",
        "data.cache_dir": place / "cache",
        "data.max_length": 64,
        "stage": "preference",
        "replay": "gradient",
        "replay.sources": f"[{{path: {place}/general.jsonl}}]",
        "replay.measure_every": 2,
        "replay.sequences": 4,
        "batch.sequences": 4,
        "batch.tokens_per_micro": 128,
        "precision": "fp32",
        "steps": 6,
        "checkpoint.every": 3,
        "checkpoint.export": "false",
        "retain": "none",
        "tracker.every": 1,
        "tracker.console": "none",
        "tracker.report": "false",
        "launch.device": "cpu",
    }
    assert work(compose([*(f"{key}={value}" for key, value in settings.items()), *more])) == 0
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == "train"}


def test_a_run_goes_on_with_the_coefficient_it_had(tmp_path, tiny_model_dir):
    """Stopped after step 3, one before the next measurement, whose average remembers the two before it."""
    write(tmp_path)
    whole = run(tmp_path, tiny_model_dir, "whole", "checkpoint.keep=2")
    saved = tmp_path / "whole/checkpoints/step-000003"
    resumed = run(tmp_path, tiny_model_dir, "resumed", f"resume={saved}")
    assert sorted(resumed) == [4, 5, 6]
    for step, line in resumed.items():
        for name in ("loss", "replay/loss", "grad_norm", "replay/coefficient", "grad_norm_replay"):
            assert line[name] == whole[step][name], (step, name)
    coefficients = [whole[step]["replay/coefficient"] for step in range(1, 7)]
    assert coefficients[0] == coefficients[1] != coefficients[2] == coefficients[3] != coefficients[4]


def test_a_tenth_is_a_tenth(tmp_path, tiny_model_dir):
    write(tmp_path)
    first = run(tmp_path, tiny_model_dir, "first", "steps=1")[1]
    asked = first["replay/coefficient"] * first["grad_norm_replay"]
    assert asked == pytest.approx(0.1 * first["grad_norm_own"])
    total = first["grad_norm"]  # of both together: between the difference and the sum of the two
    own, part = first["grad_norm_own"], 0.1 * first["grad_norm_own"]
    assert own - part - 1e-6 <= total <= own + part + 1e-6
