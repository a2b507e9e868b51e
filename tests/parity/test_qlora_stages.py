"""Stages over a base in four bits, against LoRA over a base that was replaced by what four bits leave of it.

The reference is the policy without its adapter, answers are written by a copy of the policy, and a critic has
a base of its own: all of them must be the rounded model, and none the plain one.
"""

import pytest
import stage_recipes
import torch
from test_stages import same_curve

from framework.models import load, nf4

CHANGES = {"adapter__rank": 4, "optim__lr": 1e-2}


def rounded(path, place, *, head="lm"):
    """The model in `path` with every weight that qlora quantises as it comes back, in fp32, in `place`."""
    description = load.inspect(str(path), head=head)
    lm = load.load(description, dtype=torch.float32)
    nf4.round_(lm, double=False)
    lm.save_pretrained(place)
    description.tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir):
    place = stage_recipes.write(tmp_path_factory.mktemp("stages"), tiny_model_dir)
    rounded(tiny_model_dir, place / "rounded")
    rounded(place / "judge", place / "rounded-judge", head="score")
    return place


@pytest.fixture(scope="module")
def over_rounded(place):
    """Runs with LoRA, made once for each stage."""
    made = {}

    def get(kind):
        if kind not in made:
            critic = {"stage__critic": place / "rounded-judge"} if kind == "ppo" else {}
            changes = {"adapter": "lora", **CHANGES, **critic}
            made[kind] = stage_recipes.run(1, kind, place, place / "rounded", **changes)
        return made[kind]

    return get


@pytest.mark.parametrize(
    ("kind", "size", "strategy"),
    [
        ("dpo", 2, "fsdp"),
        ("grpo", 2, "zero3"),
        ("ppo", 1, "ddp"),
    ],
)
def test_a_stage_over_four_bits_is_lora_over_the_rounded_base(
    kind, size, strategy, place, over_rounded, tiny_model_dir
):
    changes = {"adapter": "qlora", "strategy": strategy, **CHANGES}
    found = stage_recipes.run(size, kind, place, tiny_model_dir, **changes)
    same_curve(found, over_rounded(kind))


def test_the_rounded_base_is_another_model(place, over_rounded, tiny_model_dir):
    """Guards the guard: LoRA over the plain base draws a curve that is far outside of the tolerance."""
    plain = stage_recipes.run(1, "dpo", place, tiny_model_dir, adapter="lora", **CHANGES)
    first, other = plain["lines"][1]["loss"], over_rounded("dpo")["lines"][1]["loss"]
    assert abs(first / other - 1) > 1e-3
