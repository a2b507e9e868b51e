"""Stages with a policy in 8-bit floats, emulated: what it is compared with or writes with stays as it is."""

import pytest
import stage_recipes
import workers

pytest.importorskip("torchao")

FP8 = {"model.fp8": "rowwise_with_gw_hp", "model.fp8_emulate": "true"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir):
    return stage_recipes.write(tmp_path_factory.mktemp("fp8-stages"), tiny_model_dir)


def run(size, kind, place, model, **changes):
    line = stage_recipes.arguments(kind, place, model, **changes)
    return workers.run(size, stage_recipes.measure, line, steps=2, timeout_s=180)[0]


@pytest.mark.parametrize("kind", stage_recipes.STAGES)
def test_every_stage_trains_on_one_rank_and_two(kind, place, tiny_model_dir):
    """One loss whatever the ranks, as every token has a scale of its own; near the one without, and not it.

    Answers of the first iteration are the same tokens as without: the copy that writes them holds the same
    weights and is not converted.
    """
    plain = run(1, kind, place, tiny_model_dir)
    alone = run(1, kind, place, tiny_model_dir, **FP8)
    spread = run(2, kind, place, tiny_model_dir, strategy="fsdp", **FP8)
    assert alone["losses"][0] != plain["losses"][0]
    assert alone["losses"][0] == pytest.approx(plain["losses"][0], rel=0.1, abs=0.05)
    assert spread["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-4, abs=1e-6)
    assert spread["norms"][0] == pytest.approx(alone["norms"][0], rel=1e-3)
    assert alone["tokens"][:1] == spread["tokens"][:1] == plain["tokens"][:1]
