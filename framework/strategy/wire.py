"""Bytes that one rank sends in an optimizer step, by how its model is spread. Arithmetic alone.

Letters: w ranks, r = (w - 1) / w, m micro-batches of a step. Gradients are summed in fp32 everywhere; weights
travel in the type they compute in. `tests/multihost/test_wire.py` counts the bytes of real links: all but
ZeRO-1 and 2 are within 3 %.
"""

from __future__ import annotations

from dataclasses import dataclass

GRADIENT = 4  # bytes of an element of a gradient on its way


@dataclass(frozen=True)
class Load:
    """What there is to send, in elements."""

    blocks: int  # weights of the blocks, trained and frozen, gathered block by block
    rest: int  # embedding, last norm and head, gathered with the whole
    trained: int  # elements that have a gradient
    weight_bytes: int  # 4 in fp32, 2 in bf16

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return (self.blocks + self.rest) * self.weight_bytes


def ddp(w: int, m: int, load: Load) -> float:
    """2 r N: one all-reduce of the gradient a step, however it is cut."""
    return 2 * _others(w) * load.trained * GRADIENT


def fsdp(w: int, m: int, load: Load) -> float:
    """Each micro-batch: r (2 N_blocks + N_rest) to gather weights, r N_trained to scatter gradients."""
    gathered = (2 * load.blocks + load.rest) * load.weight_bytes
    return _others(w) * m * (gathered + load.trained * GRADIENT)


def fsdp_kept(w: int, m: int, load: Load) -> float:
    """The same with weights kept from the first micro-batch to the last: once a step, whatever m."""
    return _others(w) * (load.weights + load.trained * GRADIENT)


def hsdp(w: int, m: int, load: Load, *, shards: int, kept: bool = False) -> float:
    """Fully sharded over `shards` ranks, and once a step 2 (k - 1) / k of a shard's gradient over k copies.

    `kept` as in `fsdp_kept`.
    """
    over_copies = 2 * _others(w // shards) * load.trained / shards * GRADIENT
    return (fsdp_kept if kept else fsdp)(shards, m, load) + over_copies


def zero3(w: int, m: int, load: Load, *, gloo: bool = False) -> float:
    """r N to gather weights, which DeepSpeed keeps from forward to backward pass as long as fewer than 1e9
    elements are gathered, and r N_trained for gradients; over gloo twice that, whose reduce-scatter sends
    what an all-reduce does."""
    return _others(w) * m * (load.weights + (2 if gloo else 1) * load.trained * GRADIENT)


def zero1(w: int, m: int, load: Load) -> float:
    """r N_trained for gradients once a step, and as much to gather updated weights. Derived, not counted."""
    return _others(w) * load.trained * (GRADIENT + load.weight_bytes)


def zero2(w: int, m: int, load: Load) -> float:
    """As ZeRO-1 with gradients reduced after every micro-batch. Derived, not counted."""
    return _others(w) * load.trained * (m * GRADIENT + load.weight_bytes)


def _others(w: int) -> float:
    """r, the share of a tensor that belongs to other ranks."""
    return (w - 1) / w
