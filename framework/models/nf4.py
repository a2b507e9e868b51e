"""Frozen weights in four bits (NF4, of QLoRA: Dettmers et al. 2023, arXiv 2305.14314), under LoRA adapters.

A weight [O, I] is cut along its rows into blocks of 64; of each block the largest magnitude is kept, its
scale, and each element becomes the nearest of 16 levels times that. What is kept are plain tensors of whole
numbers, two elements a byte, so every strategy broadcasts, shards and gathers them as they are.

Quantising is done here, on the rank that reads the weights: so every device and every start trains against
the same base, to the bit. bitsandbytes gives the same codes where rows are whole blocks, and on CUDA, where
it is installed, its kernel brings them back.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from framework.errors import ModelError
from framework.models.adapters import is_adapter
from framework.models.policy import causal_lm, layers

BLOCK = 64  # elements that share a scale
GROUP = 256  # scales that share a scale of their own, where scales are quantised too
LARGEST = 127  # of a signed byte
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, zero among them, brought to [-1, 1] (appendix E)."""

TINY = torch.finfo(torch.float32).tiny  # in place of the scale of a block of zeros
AT_ONCE = 2**20  # elements computed together: what is held besides the result stays below 16 MiB

CODES, SCALES, GROUPS = KEPT = "codes", "scales", "groups"  # parameters of a `Nf4Linear` for its weight


class Nf4Linear(nn.Module):
    """y = x W^T + b with a frozen W [O, I] that is brought back from four bits for each product.

    `codes` [O, I / 2] uint8: two elements a byte, the first one high. `scales` [O, ceil(I / 64)] int32: the
    bits of fp32, since whole numbers are what no strategy rounds. Quantised twice, `scales` are int8, their
    distance from their mean, and `groups` int32, the bits of fp32: that mean, then the unit of every 256.
    """

    def __init__(self, linear: nn.Linear, *, double: bool) -> None:
        """In place of `linear`, whose bias it takes; without values yet."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, (shape, dtype) in shapes(linear.weight.shape, double=double).items():
            empty = torch.empty(shape, dtype=dtype, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        packed = {name: p for name, p in self.named_parameters(recurse=False) if name != "bias"}
        return _Product.apply(x, self.bias, tuple(packed), *packed.values())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class _Product(torch.autograd.Function):
    """Keeps the packed weight for the backward pass, and neither the weight nor the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, names: tuple[str, ...], *packed: Tensor) -> Tensor:
        ctx.names = names
        ctx.save_for_backward(*packed)
        weight = dequantised(dict(zip(names, packed, strict=True)), x.dtype)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = dequantised(dict(zip(ctx.names, ctx.saved_tensors, strict=True)), grad.dtype)
        return grad @ weight, None, None, *(None for _ in ctx.names)


def shapes(shape: Iterable[int], *, double: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of what is kept of a weight [O, I], by name."""
    rows, width = shape
    blocks = -(-width // BLOCK)
    kept: dict[str, tuple[tuple[int, ...], torch.dtype]] = {CODES: ((rows, width // 2), torch.uint8)}
    if not double:
        return kept | {SCALES: ((rows, blocks), torch.int32)}
    groups = -(-rows * blocks // GROUP)
    return kept | {SCALES: ((rows, blocks), torch.int8), GROUPS: ((1 + groups,), torch.int32)}


@torch.no_grad()
def quantised(weight: Tensor, *, double: bool) -> dict[str, Tensor]:
    """What is kept of `weight` [O, I] of any floating type, by name; computed in fp32 on its device.

    `double` quantises the scales, too: to 8 bits around their mean, 256 of them together.
    """
    rows, width = weight.shape
    middles = torch.tensor(LEVELS).unfold(0, 2, 1).mean(1).tolist()  # [15]
    codes, scales = [], []
    for part in weight.split(max(1, AT_ONCE // width)):  # rows
        blocks = _blocks(part.float())
        scale = blocks.abs().amax(-1)  # [o, blocks]
        shrunk = (blocks / scale.clamp_min(TINY)[..., None]).flatten(1)[:, :width]
        nearest = torch.zeros_like(shrunk, dtype=torch.uint8)
        for middle in middles:  # on a CPU twice as fast as torch.bucketize
            nearest += shrunk > middle
        codes.append(nearest[:, ::2] << 4 | nearest[:, 1::2])
        scales.append(scale)
    kept = {CODES: torch.cat(codes), SCALES: torch.cat(scales)}
    if not double:
        return kept | {SCALES: kept[SCALES].view(torch.int32)}
    mean = kept[SCALES].mean()
    flat = (kept[SCALES] - mean).flatten()
    grouped = nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    unit = grouped.abs().amax(1) / LARGEST
    steps = (grouped / unit.clamp_min(TINY)[:, None]).round().to(torch.int8).flatten()[: len(flat)]
    return {
        CODES: kept[CODES],
        SCALES: steps.view(rows, -1),
        GROUPS: torch.cat([mean[None], unit]).view(torch.int32),
    }


@torch.no_grad()
def dequantised(kept: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight [O, I] that `kept` stands for: level times scale in fp32, rounded to `dtype` once."""
    codes, scales = kept[CODES], _scales(kept)
    rows, width = codes.shape[0], 2 * codes.shape[1]
    if codes.is_cuda and width % BLOCK == 0 and has_kernel():
        return by_kernel(codes, scales, dtype)
    weight = torch.empty(rows, width, dtype=dtype, device=codes.device)
    pairs = _pairs(codes.device)
    together = max(1, AT_ONCE // width)  # rows
    parts = (each.split(together) for each in (weight, codes, scales))
    for part, code, scale in zip(*parts, strict=True):
        levels = pairs.index_select(0, code.flatten().int()).view(torch.float32).view(len(code), width)
        part.copy_(_blocks(levels).mul_(scale[..., None]).flatten(1)[:, :width])
    return weight


@functools.cache
def has_kernel() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def by_kernel(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantised` by bitsandbytes, for rows of whole blocks."""
    import bitsandbytes  # noqa: F401  # registers its operators

    flat = [1, 2 * codes.numel()]  # its CPU kernel is wrong about rows shorter than a block
    weight = torch.ops.bitsandbytes.dequantize_4bit(
        codes.reshape(-1, 1), scales.flatten(), BLOCK, "nf4", flat, dtype
    )
    return weight.view(codes.shape[0], -1)


def _scales(kept: Mapping[str, Tensor]) -> Tensor:
    """[O, ceil(I / 64)] fp32."""
    scales = kept[SCALES]
    if GROUPS not in kept:
        return scales.view(torch.float32)
    groups = kept[GROUPS].view(torch.float32)
    steps = scales.float().flatten()
    grouped = nn.functional.pad(steps, (0, -len(steps) % GROUP)).view(-1, GROUP)
    return ((grouped * groups[1:, None]).flatten()[: len(steps)] + groups[0]).view_as(scales)


def _blocks(values: Tensor) -> Tensor:
    """[o, I] as [o, ceil(I / 64), 64], the last block of each row filled up with zeros."""
    short = -values.shape[1] % BLOCK
    whole = nn.functional.pad(values, (0, short)) if short else values
    return whole.view(len(values), -1, BLOCK)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """[256]: the two fp32 levels that a byte stands for, as the bits of one fp64: fetched together."""
    levels = torch.tensor(LEVELS)
    return torch.cartesian_prod(levels, levels).contiguous().view(torch.float64).view(-1).to(device)


def chosen(lm: Any) -> dict[str, nn.Linear]:
    """Which layers of a transformers model, plain or inside a peft model, are quantised, by name.

    Every linear layer of its blocks. Embeddings, norms, the head and adapters stay as they are.
    """
    inside = {id(module) for block in layers(causal_lm(lm).base_model) for module in block.modules()}
    return {
        name: module
        for name, module in lm.named_modules()
        if type(module) is nn.Linear and id(module) in inside and not is_adapter(f"{name}.weight")
    }


def check(lm: Any, kind: str) -> None:
    """Raises ModelError unless the matrices in blocks of `lm`, of type `kind`, belong to linear layers."""
    linear = chosen(lm)
    held = {id(layer.weight) for layer in linear.values()}
    odd = [f"{name}.weight" for name, layer in linear.items() if layer.in_features % 2]
    for block in layers(causal_lm(lm).base_model):
        odd += [name for name, p in block.named_parameters() if p.dim() > 1 and id(p) not in held]
    if odd:
        raise ModelError(
            f"adapter=qlora cannot hold a model of type {kind} in four bits: {odd[0]} belongs to no plain "
            "linear layer with an even number of inputs; type adapter=lora"
        )


def quantise(lm: Any, *, double: bool) -> Any:
    """`lm`, with a `Nf4Linear` without values in place of each layer that is `chosen`."""
    for name, linear in chosen(lm).items():
        parent, _, leaf = name.rpartition(".")
        setattr(lm.get_submodule(parent), leaf, Nf4Linear(linear, double=double))
    return lm


@torch.no_grad()
def packed(name: str, weight: nn.Parameter, *, double: bool) -> Iterator[tuple[str, Tensor]]:
    """What is kept of the layer whose weight is called `name`, as in a `Nf4Linear`. `weight` is let go of."""
    kept = quantised(weight, double=double)
    weight.data = weight.new_empty(0)
    for part, tensor in kept.items():
        yield name.removesuffix("weight") + part, tensor


@torch.no_grad()
def round_(lm: Any, *, double: bool) -> None:
    """Give each layer that is `chosen` the weight that is left of its own."""
    for linear in chosen(lm).values():
        weight = linear.weight
        weight.copy_(dequantised(quantised(weight, double=double), weight.dtype))


def unpacked(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """An engine's weights with quantised ones as they would be named and shaped in a plain model, in fp32.

    What is kept of one weight comes one after the other. A tensor is valid until the next one is asked for.
    """
    kept: dict[str, Tensor] = {}
    before = ""
    for full_name, tensor in weights:
        layer, _, name = full_name.rpartition(".")
        if kept and (layer != before or name not in KEPT):
            yield f"{before}.weight", dequantised(kept, torch.float32)
            kept = {}
        if name in KEPT:
            kept[name], before = tensor.clone(), layer  # what is yielded is valid until the next one only
        else:
            yield full_name, tensor
    if kept:
        yield f"{before}.weight", dequantised(kept, torch.float32)
