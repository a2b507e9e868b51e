"""An actor and a critic that multiply in 8-bit floats, emulated, on one rank and several: the same numbers.

Every strategy gets the same micro-batches whatever the number of ranks, as activations are scaled over one.
"""

import pytest
import spread
import torch
import workers
from torch import nn

from framework.strategy.fp8 import Fp8
from framework.strategy.memory import PLAIN, Blocks

pytest.importorskip("torchao")

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
CELLS = [
    *(("fsdp", 2, recipe) for recipe in RECIPES),
    ("ddp", 2, "tensorwise"),
    ("fsdp-kept", 2, "tensorwise"),
    ("fsdp_offload", 2, "tensorwise"),
    ("zero1", 2, "tensorwise"),
    ("zero2", 2, "tensorwise"),
    ("hsdp", 4, "tensorwise"),
]


def trains(world, name, path, how, steps=3):
    """(losses, norms, weights) of global steps, and the layers that were converted."""
    engine = spread.engine(world, name, path, blocks=how)
    with engine.held() as held:  # the first rows, which are the first rank's, hold the largest magnitudes
        for parameter, slices in held.items():
            if parameter.endswith("_proj.weight"):
                columns = engine.trained[parameter][1]
                for part in slices:
                    part.values["master"][: max(0, columns - part.start)] *= 8
    losses, norms = [], []
    for number in range(steps):
        losses.append(world.sum([forward(engine, number)])[0])
        norms.append(step(engine, number))
    modules = getattr(engine, "_module", None) or nn.Module()
    converted = [n for n, m in modules.named_modules() if type(m).__name__ == "Float8Linear"]
    weights = {name: (list(w.shape), w.flatten().tolist()) for name, w in engine.weights()}
    return losses, norms, weights, converted


def forward(engine, number):
    """This rank's share of the loss, asked before the step."""
    with engine.inference():
        return sum(spread.loss_of(engine, each, spread.VALUES).item() for each in shares(engine, number))


def step(engine, number, lr=1e-3):
    batches = shares(engine, number)
    for each in batches:
        with engine.micro(last=each is batches[-1]):
            engine.backward(spread.loss_of(engine, each, spread.VALUES))
    return engine.step(lr=lr, max_grad_norm=None)


def shares(engine, number):
    """This rank's of the four micro-batches of a step."""
    return spread.shares(engine.world, number, 4 // engine.world.size)


@pytest.fixture(scope="module")
def alone(tiny_model_dir):
    """One process, by recipe; None: not in 8 bits."""
    made = {}

    def get(recipe):
        if recipe not in made:
            how = Blocks(fp8=Fp8(recipe, emulate=True)) if recipe else PLAIN
            (made[recipe],) = workers.run(1, trains, "ddp", str(tiny_model_dir), how)
        return made[recipe]

    return get


@pytest.mark.parametrize(("name", "size", "recipe"), CELLS)
def test_every_number_of_ranks_rounds_alike(name, size, recipe, alone, tiny_model_dir):
    """Losses and norms to 1e-5, where rounding moves them by a hundred times as much: weights are scaled
    whole, though a rank keeps a part of them, the largest magnitude on one rank alone."""
    how = Blocks(fp8=Fp8(recipe, emulate=True))
    expected, plain = alone(recipe), alone(None)
    assert abs(expected[0][0] / plain[0][0] - 1) > 1e-3
    for losses, norms, _, _ in workers.run(size, trains, name, str(tiny_model_dir), how, timeout_s=120):
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert norms == pytest.approx(expected[1], rel=1e-5)


def test_actor_and_critic_are_converted_and_names_stay(alone):
    """Attention's layers of 32 and 16 channels; those of the feed-forward part have 72."""
    _, _, weights, converted = alone("tensorwise")
    attention = [f"self_attn.{kind}_proj" for kind in "qkvo"]
    assert converted == [
        f"{model}.lm.model.layers.{block}.{layer}"
        for model in ("policy", "critic")
        for block in range(3)
        for layer in attention
    ]
    assert list(weights) == list(alone(None)[2])


def test_a_model_that_is_only_asked_is_not_converted(tiny_model_dir):
    frozen = workers.run(1, asks, str(tiny_model_dir))[0]
    assert frozen == []


def asks(world, path):
    strategy = spread.STRATEGIES["ddp"](world, blocks=Blocks(fp8=Fp8("tensorwise", emulate=True)))
    module = strategy.freeze(*spread.model(path))._module
    return [name for name, m in module.named_modules() if type(m).__name__ == "Float8Linear"]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_loss_falls_as_without(name, alone, tiny_model_dir):
    """30 steps on the same six rows, in bf16 and 8 bits."""
    how = Blocks(fp8=Fp8("tensorwise", emulate=True))
    for losses in workers.run(2, falls, name, str(tiny_model_dir), how):
        assert losses[-1] < 0.8 * losses[0]
        assert all(torch.isfinite(torch.tensor(losses)))


def falls(world, name, path, how):
    engine, losses = spread.engine(world, name, path, precision="bf16", blocks=how), []
    for _ in range(30):
        losses.append(world.sum([forward(engine, 0)])[0])
        step(engine, 0, lr=3e-3)
    return losses
