"""One process and every strategy, on 1, 2 and 4 ranks, against plain transformers in fp32."""

import pytest
import recipes
import torch
import workers

STRATEGIES = ["ddp", "fsdp", "zero3"]
TWO_COPIES = "hsdp strategy.shard_size=2 launch.nproc=4"
CELLS = [
    *(
        (strategy, size, adapter)
        for strategy in STRATEGIES
        for size in (1, 2, 4)
        for adapter in ("full", "lora")
        if size > 1 or strategy == "ddp"  # one process trains replicated under all of them
    ),
    ("ddp", 1, "dora"),
    ("ddp", 2, "dora"),
    ("fsdp", 2, "dora"),
    ("zero3", 2, "dora"),
    *((strategy, 2, "qlora") for strategy in STRATEGIES),
    *((strategy, 2, "full") for strategy in ("hsdp", "fsdp_offload", "zero1", "zero2")),
    *(pytest.param(TWO_COPIES, 4, adapter, marks=pytest.mark.slow) for adapter in ("full", "lora")),
]
"""Strategies that are variations of another one are held to less: their own tests are in tests/strategy, and
all of them are in the certificate."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipes.write_rows(tmp_path_factory.mktemp("parity") / "rows.jsonl")


@pytest.fixture(scope="module")
def references(data, tiny_model_dir):
    """Plain runs by adapter, made once."""
    made = {}

    def get(adapter):
        if adapter not in made:
            arguments = recipes.overrides(tiny_model_dir, data, data.parent, adapter=adapter)
            made[adapter] = recipes.reference(arguments, steps=20)
        return made[adapter]

    return get


def largest_difference(gradient, expected):
    """Over all parameters: largest absolute difference over the largest entry of the reference."""
    assert gradient.keys() == expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    return max(float((gradient[name] - tensor).abs().max()) for name, tensor in expected.items()) / scale


@pytest.mark.parametrize(("strategy", "size", "adapter"), CELLS)
def test_every_strategy_trains_what_plain_transformers_trains(
    strategy, size, adapter, data, references, tiny_model_dir
):
    """Loss, gradient, norm of the first step to 1e-5; losses of 20 steps to 1e-4; uneven, masked rows.

    5 steps where only the adapter or a variation of the strategy is new.
    """
    expected = references(adapter)
    steps = 20 if strategy in STRATEGIES and adapter in ("full", "lora") else 5
    arguments = recipes.overrides(tiny_model_dir, data, data.parent, adapter=adapter)
    ranks = workers.run(
        size, recipes.measure, [*arguments, *f"strategy={strategy}".split()], steps=steps, timeout_s=180
    )
    assert len({tuple(rank["micros"]) for rank in ranks}) == 1
    assert max(ranks[0]["micros"]) > 1, "the step must be cut for this test to mean anything"
    assert ranks[0]["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-5)
    assert ranks[0]["norms"][0] == pytest.approx(expected["norms"][0], rel=1e-5)
    assert largest_difference(recipes.whole(ranks), expected["gradient"]) < 1e-5
    assert ranks[0]["losses"] == pytest.approx(expected["losses"][:steps], rel=1e-4)
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("tokens", [128, 4096])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_cut_into_micro_batches_changes_nothing(
    strategy, tokens, packing, data, references, tiny_model_dir
):
    """Packed and padded, from an example a micro-batch to the whole step at once, on 2 ranks."""
    expected = references("full")
    arguments = recipes.overrides(
        tiny_model_dir,
        data,
        data.parent,
        strategy=strategy,
        data__packing=packing,
        batch__tokens_per_micro=tokens,
    )
    ranks = workers.run(2, recipes.measure, arguments, steps=2, timeout_s=120)
    assert ranks[0]["losses"] == pytest.approx(expected["losses"][:2], rel=1e-5)
    assert largest_difference(recipes.whole(ranks), expected["gradient"]) < 1e-5


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recomputed_activations_give_the_same_gradient(
    strategy, checkpointing, data, references, tiny_model_dir
):
    expected = references("full")
    arguments = recipes.overrides(
        tiny_model_dir,
        data,
        data.parent,
        strategy=strategy,
        model__activation_checkpointing=checkpointing,
    )
    ranks = workers.run(2, recipes.measure, arguments, steps=1, timeout_s=120)
    assert largest_difference(recipes.whole(ranks), expected["gradient"]) < 1e-5


@pytest.mark.slow  # a C++ compiler runs
def test_compiled_blocks_give_the_same_gradient(data, references, tiny_model_dir):
    expected = references("full")
    arguments = recipes.overrides(tiny_model_dir, data, data.parent, strategy="fsdp", model__compile="blocks")
    ranks = workers.run(2, recipes.measure, arguments, steps=2, timeout_s=600)
    assert ranks[0]["losses"] == pytest.approx(expected["losses"][:2], rel=1e-5)
    assert largest_difference(recipes.whole(ranks), expected["gradient"]) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_stays_near_fp32(strategy, data, references, tiny_model_dir):
    """The stated bound of bf16 (8 bits of mantissa) on this model: 2 % of the loss over 20 steps."""
    expected = references("full")
    arguments = recipes.overrides(tiny_model_dir, data, data.parent, strategy=strategy, precision="bf16")
    ranks = workers.run(2, recipes.measure, arguments, steps=20, timeout_s=180)
    assert ranks[0]["losses"] == pytest.approx(expected["losses"], rel=2e-2)


def test_a_head_of_its_own_is_sharded_and_trained_right(data, tiny_untied_dir):
    arguments = recipes.overrides(tiny_untied_dir, data, data.parent)
    expected = recipes.reference(arguments, steps=1)
    for strategy in STRATEGIES:
        ranks = workers.run(2, recipes.measure, [*arguments, f"strategy={strategy}"], steps=1)
        assert largest_difference(recipes.whole(ranks), expected["gradient"]) < 1e-5


def test_the_reference_would_notice_a_mean_of_means(data, references, tiny_model_dir):
    """Guards the guard: dividing each micro-batch by its own units is far outside the tolerance."""
    arguments = recipes.overrides(tiny_model_dir, data, data.parent)
    ranks = workers.run(1, mean_of_means, arguments)
    assert abs(ranks[0] / references("full")["losses"][0] - 1) > 1e-3


def mean_of_means(world, arguments):
    from framework.config import build, compose, stages

    prepared = build.prepare(compose.compose(arguments))
    engine = build.build_engine(prepared, world)
    stage = stages.build_stage(prepared, world, engine)
    (term,) = stage.next(0)
    with torch.no_grad():
        means = [float(term.objective(engine, batch).total()) / batch.units for batch in term.micros]
    return sum(means) / len(means)
