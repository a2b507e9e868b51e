"""What waits on the CPU comes back bit for bit, and leaves the memory it was in."""

import gc

import pytest
import torch
import toy
import workers
from torch.multiprocessing.reductions import StorageWeakRef

from framework.strategy import offload
from framework.strategy.memory import Blocks, prepare_blocks


@pytest.fixture(autouse=True)
def _everything(monkeypatch):
    """Tensors of these sizes would stay."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)


def passed(blocks):
    """(gradients, results of layers inside of blocks that are alive between forward and backward)"""
    model = toy.Toy(dropout=0.3)
    model.load_state_dict(dict(toy.source()), strict=False)
    prepare_blocks(model, blocks)
    made = []
    for block in model.blocks():
        for layer in (block.norm, block.qkv, block.up, block.down):
            layer.register_forward_hook(lambda _, __, out: made.append(StorageWeakRef(out.untyped_storage())))
    batch = toy.pad(toy.examples(0))
    torch.manual_seed(3)
    loss = toy.total(model(batch), batch)
    gc.collect()
    alive = sum(not storage.expired() for storage in made)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, alive


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_gradients_are_the_same_to_the_bit_and_nothing_stays(checkpointing):
    expected, kept = passed(Blocks())
    found, alive = passed(Blocks(checkpointing, offload=True))
    assert kept > 0
    assert alive == 0
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_a_tensor_is_moved_once_and_weights_never(monkeypatch):
    """Three projections keep the same input. A checkpointed block moves its input alone."""
    away, moved = offload._Moving._away, []

    def counted(self, tensor):
        known = len(self._moved)
        answer = away(self, tensor)
        if len(self._moved) > known:
            moved.append(tuple(tensor.shape))
        assert not any(offload._address(tensor) == offload._address(p) for p in self._block.parameters())
        return answer

    monkeypatch.setattr(offload._Moving, "_away", counted)

    class Three(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def blocks(self):
            return [self]

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    for blocks, inputs in ((Blocks(offload=True), 1), (Blocks("full", offload=True), 1)):
        model = Three()
        prepare_blocks(model, blocks)
        moved.clear()
        model(torch.randn(2, 4, requires_grad=True)).sum().backward()
        assert moved == [(2, 4)] * inputs
        assert all(p.grad is not None for p in model.parameters())


def test_small_and_shared_tensors_stay(monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 64)
    block = torch.nn.Module()
    moving = offload._Moving(block, {offload._address(shared := torch.randn(100))})
    assert isinstance(moving.pack(torch.randn(100)), offload._Moved)
    for stays in (torch.randn(15), torch.arange(100), shared, torch.randn(1).expand(100)):
        assert moving.pack(stays) is stays


def trains(world, name, blocks, options):
    offload.LEAST_BYTES = 0
    engine = toy.start(world, name, dropout=0.3, precision="bf16", blocks=blocks, **options)
    return toy.advance(engine, range(2), count=2), str(toy.portable(engine.state_dict()))


@pytest.mark.parametrize(
    ("name", "options"), [("ddp", {}), ("fsdp", {}), ("fsdp", {"reshard_after_forward": False})]
)
def test_under_every_engine_it_changes_no_bit(name, options):
    expected = workers.run(2, trains, name, Blocks(), options)
    for checkpointing in ("none", "full"):
        assert workers.run(2, trains, name, Blocks(checkpointing, offload=True), options) == expected
