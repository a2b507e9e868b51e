"""Seeds of the RLHF demonstration are added to what was measured before, model by model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import rlhf_demo


def run(seed, *, sft=0.5, **accuracy):
    seconds = dict.fromkeys(accuracy, 10.0)
    return {
        "seed": seed,
        "accuracy": {"sft": sft, **accuracy},
        "seconds": {**seconds, "in all": sum(seconds.values())},
    }


def test_other_seeds_and_other_models_are_kept():
    before = [run(0, dpo=0.5, ppo=0.75), run(2, dpo=0.625)]
    zero, one, two = rlhf_demo.added([run(1, dpo=0.25), run(0, dpo=0.75)], before)
    assert zero["accuracy"] == {"sft": 0.5, "dpo": 0.75, "ppo": 0.75}
    assert zero["seconds"] == {"dpo": 10.0, "ppo": 10.0, "in all": 20.0}
    assert (one["seed"], one["accuracy"]["dpo"]) == (1, 0.25)
    assert two == before[1]


def test_ways_from_different_starts_are_not_put_together():
    with pytest.raises(SystemExit, match=r"seed 0: sft reached 0\.375 and, before, 0\.5"):
        rlhf_demo.added([run(0, sft=0.375, dpo=0.5)], [run(0, ppo=0.75)])
