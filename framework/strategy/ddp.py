"""Replicated training: the whole model on every rank, and the world of one.

In bf16 the module computes with rounded copies of fp32 masters; in fp32 its parameters are the
masters. Gradients are summed in fp32 over micro-batches and, once per step, over ranks. A frozen
parameter has neither master nor gradient nor moments.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.strategy import common
from framework.strategy.base import (
    Build,
    EngineState,
    OptimizerFactory,
    Read,
    Slice,
    Weights,
    World,
)
from framework.strategy.buckets import Buckets
from framework.strategy.common import COMPUTE, Part
from framework.strategy.frozen import Frozen, put_whole
from framework.strategy.memory import PLAIN, Blocks, prepare_blocks


@dataclass(frozen=True)
class Ddp:
    """A copy of the model on every rank of `world`; with one rank, plain training.

    `precision` is "fp32" or "bf16"; `blocks` says how blocks are computed. Bytes per trained parameter
    on each rank: 16 in fp32 (weight, gradient, two moments), 18 in bf16.
    """

    world: World
    precision: str = "bf16"
    blocks: Blocks = PLAIN

    def train(self, build: Build, weights: Weights, optimizer: OptimizerFactory) -> DdpEngine:
        module = common.build_on_meta(build, self.world.device)
        masters = _fill(self.world, module, weights, COMPUTE[self.precision])
        prepare_blocks(module, self.blocks)
        return DdpEngine(self.world, module.train(), masters, optimizer)

    def freeze(self, build: Build, weights: Weights) -> Frozen:
        """2 bytes per parameter on each rank in bf16, 4 in fp32."""
        module = common.build_on_meta(build, self.world.device).requires_grad_(False)
        _fill(self.world, module, weights, COMPUTE[self.precision])
        return Frozen(self.world, module, dict(module.named_parameters()), put_whole)


class DdpEngine:
    """A replicated model in training. See `framework.strategy.base.Engine`."""

    def __init__(
        self,
        world: World,
        module: nn.Module,
        masters: Mapping[str, nn.Parameter],
        optimizer: OptimizerFactory,
    ) -> None:
        """`masters` are the fp32 masters of what is trained, by name; they may be the parameters."""
        self.world = world
        self.trained: Mapping[str, tuple[int, ...]] = {
            name: tuple(master.shape) for name, master in masters.items()
        }
        self._module = module
        self._weights = [p for name, p in module.named_parameters() if name in masters]
        self._masters = list(masters.values())
        self._parts = {name: _part(world, master) for name, master in masters.items()}
        self._optimizer = common.optimizer_over(optimizer, self._parts)
        self._buckets = Buckets(world, self._weights)
        self._updates = 0

    @property
    def updates(self) -> int:
        return self._updates

    @contextlib.contextmanager
    def micro(self, *, last: bool) -> Iterator[None]:
        if last:
            self._buckets.expect_last()
        yield
        if last:
            self._buckets.send_rest()

    def __call__(self, batch: Any, **options: Any) -> Any:
        return common.call(self._module, batch, self.world.device, **options)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, *, lr: float, max_grad_norm: float | None) -> float:
        sums = self._buckets.wait()
        # the sums are the same bits on every rank, and so are the norm and what follows from it
        norm = math.sqrt(common.sum_of_squares(sums, self.world.device).item())
        gradients = list(zip(self._masters, self._buckets.views, strict=True))
        if common.update(self._optimizer, gradients, norm=norm, lr=lr, max_grad_norm=max_grad_norm):
            self._updates += 1
            self._round()
        self._buckets.clear()
        return norm

    def inference(self) -> contextlib.AbstractContextManager[None]:
        return common.inference(self._module)

    def weights(self, *, without: str | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in common.named(self._module.named_parameters(), without):
            yield name, (self._parts[name].master if name in self._parts else parameter).detach()

    @contextlib.contextmanager
    def held(self) -> Iterator[Mapping[str, Sequence[Slice]]]:
        yield common.slices(self._optimizer, self._parts)
        self._round()

    def state_dict(self) -> EngineState:
        return common.snapshot(self._optimizer, self._parts, self._updates)

    def load_state_dict(self, updates: int, read: Read) -> None:
        common.restore(self._optimizer, self._parts, updates, read)
        self._updates = updates
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        """Make the compute weights the rounded masters, unless they are the masters."""
        if self._weights and self._weights[0] is not self._masters[0]:
            torch._foreach_copy_([*self._weights], [*self._masters])


def _part(world: World, master: nn.Parameter) -> Part:
    """All of a parameter, of which each rank saves an even slice."""
    slice_size = -(-master.numel() // world.size)
    start, stop = (min(rank * slice_size, master.numel()) for rank in (world.rank, world.rank + 1))
    return Part(tuple(master.shape), 0, master, start, stop)


def _fill(world: World, module: nn.Module, weights: Weights, compute: torch.dtype) -> dict[str, nn.Parameter]:
    """Give the meta parameters of `module` rank 0's values; returns the masters of the trained ones.

    One parameter at a time: besides its model a rank holds one more parameter in fp32.
    """
    named = dict(module.named_parameters())
    where = common.places(module)
    masters: dict[str, nn.Parameter] = {}
    for name, value in common.arriving(world, weights, named):
        empty = named[name]
        trained = empty.requires_grad
        arrives = common.dtype_to_fill(empty, compute)
        whole = torch.empty(empty.shape, dtype=arrives, device=world.device)
        if value is not None:
            whole.copy_(value.reshape(empty.shape))
        if world.size > 1:
            dist.broadcast(whole, src=0)
        parameter = nn.Parameter(whole.to(compute) if trained else whole, requires_grad=trained)
        common.hang(parameter, where[empty])
        if trained:
            masters[name] = parameter if compute == torch.float32 else nn.Parameter(whole)
    return {name: masters[name] for name in named if name in masters}
