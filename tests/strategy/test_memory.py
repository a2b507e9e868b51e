"""Activation checkpointing keeps less and changes no bit."""

import pytest
import torch
import toy
import workers

from framework.strategy.memory import Blocks, prepare_blocks


def gradients(kind, *, dropout=0.3):
    """(gradients, elements that autograd keeps between forward and backward, block forwards run)"""
    model = toy.Toy(dropout)
    model.load_state_dict(dict(toy.source()), strict=False)
    forwards = []
    for number, block in enumerate(model.blocks()):
        inner = block.forward
        block.forward = lambda *a, inner=inner, number=number, **k: (forwards.append(number), inner(*a, **k))[
            1
        ]
    prepare_blocks(model, Blocks(kind))
    batch = toy.pad(toy.examples(0))
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = toy.total(model(batch), batch)
    kept = sum(kept)
    loss.backward()
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in toy.Toy().named_parameters()]
    return {name: p.grad for name, p in model.named_parameters()}, kept, forwards


@pytest.mark.parametrize(("kind", "again"), [("selective", [2, 0]), ("full", [2, 1, 0])])
def test_gradients_are_the_same_to_the_bit_with_dropout(kind, again):
    """Three blocks: "selective" computes the first and third again, "full" all, last one first."""
    expected, all_kept, _ = gradients("none")
    found, kept, forwards = gradients(kind)
    assert forwards == [0, 1, 2, *again]
    assert kept < all_kept
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_evaluation_is_not_checkpointed_and_a_cache_is_refused():
    model = toy.Toy()
    prepare_blocks(model, Blocks("full"))
    with torch.no_grad():
        assert not model(toy.pad(toy.examples(0))).losses.requires_grad
    with pytest.raises(ValueError, match="use_cache=False"):
        model.layers[0](torch.zeros(1, 2, toy.HIDDEN), past_key_values=object())


def trains(world, name, checkpointing, options):
    options = {"blocks": Blocks(checkpointing), **options}
    engine = toy.start(world, name, dropout=0.3, precision="fp32", **options)
    return toy.advance(engine, range(2), count=2), str(toy.portable(engine.state_dict()))


@pytest.mark.parametrize(
    ("name", "options"), [("ddp", {}), ("fsdp", {}), ("fsdp", {"reshard_after_forward": False})]
)
def test_checkpointing_under_every_engine_changes_no_bit(name, options):
    expected = workers.run(2, trains, name, "none", options)
    for checkpointing in ("selective", "full"):
        assert workers.run(2, trains, name, checkpointing, options) == expected
