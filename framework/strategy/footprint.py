"""Bytes that a rank holds for a model, by how it is spread. Arithmetic alone; knows no activations.

Letters: N elements, s ranks that share a copy, b bytes of a weight where it is computed with (2 in bf16).
Masters, summed gradients and each of the two moments take 4 bytes an element that is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

FP32 = 4
DEEPSPEED_BUCKET = 50_000_000  # elements, `zero_setup.deepspeed_config`
DEEPSPEED_LIVE = 10**9  # gathered elements that DeepSpeed keeps
IN_FLIGHT = 3  # blocks of weights gathered by FSDP2: computing, coming next, and its copy on the way there


@dataclass(frozen=True)
class Sizes:
    """What there is to hold, in elements."""

    blocks: int
    rest: int  # embedding, last norm, head
    trained_blocks: int
    trained_rest: int
    block: int  # the largest one
    trained_block: int  # and the largest trained part of one
    weight_bytes: int  # b

    @property
    def every(self) -> int:
        return self.blocks + self.rest

    @property
    def trained(self) -> int:
        return self.trained_blocks + self.trained_rest


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank. The first four are there at all times, the others while they are needed."""

    weights: int
    masters: int  # fp32, apart from the weights
    gradients: int  # summed over micro-batches
    moments: int
    gathered: int = 0  # weights of other ranks
    reducing: int = 0  # while a block's gradients leave
    ending: int = 0  # while the rest's leave, when activations are gone
    on_host: bool = False  # the first four are in the host's memory

    @property
    def resident(self) -> int:
        return self.weights + self.masters + self.gradients + self.moments


def frozen(name: str, sizes: Sizes, ranks: int) -> Footprint:
    """Of a model that is only asked."""
    if name in ("ddp", "zero1", "zero2") or (ranks == 1 and not name.endswith("offload")):
        return Footprint(sizes.every * sizes.weight_bytes, 0, 0, 0)
    deepspeed = name.startswith("zero")
    gathered = min(sizes.every, DEEPSPEED_LIVE) if deepspeed else sizes.rest + IN_FLIGHT * sizes.block
    weights = _share(sizes.every * sizes.weight_bytes, ranks)
    return Footprint(weights, 0, 0, 0, gathered * sizes.weight_bytes, on_host=name == "fsdp_offload")


def trained(name: str, sizes: Sizes, ranks: int, **how: Any) -> Footprint:
    """Of a model in training over `ranks` that share a copy, under the strategy of that name.

    `kept`, `several` and `cpu` are of FSDP: weights kept from pass to pass, more than one micro-batch a step,
    and a reduction over gloo, which holds what it receives beside what it gives. `second` is of zeropp: the
    ranks that share a second copy of the weights.
    """
    if ranks == 1 and not name.endswith("offload"):  # one rank has nothing to share
        return _ddp(sizes)
    if name == "ddp":
        return _ddp(sizes)
    if name == "zero3_offload":  # its share of the weights may be on the device or not: counted there
        held = _zero(3, sizes, ranks)
        return replace(held, weights=0, gathered=held.gathered + held.weights, on_host=True)
    if name == "zeropp":
        held, second = _zero(3, sizes, ranks), how["second"]
        copy = _share(sizes.weight_bytes * sizes.every, second) if second < ranks else 0
        return replace(held, weights=held.weights + copy)
    if name.startswith("zero"):
        return _zero(int(name[-1]), sizes, ranks)
    return _fsdp(sizes, ranks, offload=name == "fsdp_offload", **how)


def _ddp(sizes: Sizes) -> Footprint:
    masters = 0 if sizes.weight_bytes == FP32 else FP32 * sizes.trained
    return Footprint(
        sizes.every * sizes.weight_bytes, masters, FP32 * sizes.trained, 2 * FP32 * sizes.trained
    )


def _fsdp(sizes: Sizes, ranks: int, *, offload: bool, kept: bool, several: bool, cpu: bool) -> Footprint:
    """16 N / s, and the gathered blocks."""
    b, each = sizes.weight_bytes, _share(FP32 * sizes.trained, ranks)
    copies = 2 if cpu else 1
    blocks = sizes.blocks + sizes.block if kept else IN_FLIGHT * sizes.block
    leaving = sizes.trained_block * b + copies * FP32 * sizes.trained_block
    return Footprint(
        weights=_share(b * (sizes.every - sizes.trained), ranks),
        masters=each,
        gradients=each + (FP32 * sizes.trained if kept and several else 0),
        moments=2 * each,
        gathered=(sizes.rest + blocks) * b,
        reducing=leaving + _share(FP32 * sizes.trained_block, ranks),
        ending=(b + copies * FP32) * sizes.trained_rest + _share(FP32 * sizes.trained_rest, ranks),
        on_host=offload,
    )


def _zero(stage: int, sizes: Sizes, ranks: int) -> Footprint:
    """DeepSpeed keeps masters apart from weights in fp32 runs, too."""
    b, each = sizes.weight_bytes, _share(FP32 * sizes.trained, ranks)
    return Footprint(
        weights=_share(b * sizes.every, ranks) if stage == 3 else b * sizes.every,
        masters=each,
        gradients=each if stage > 1 else FP32 * sizes.trained,
        moments=2 * each,
        gathered=b * min(sizes.every, DEEPSPEED_LIVE) if stage == 3 else 0,
        reducing=FP32 * min(sizes.trained, DEEPSPEED_BUCKET) if stage > 1 else 0,
    )


def _share(count: int, ranks: int) -> int:
    return -(-count // ranks)
