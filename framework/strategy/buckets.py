"""Gradients of replicated parameters, summed in flat fp32 buckets while the backward pass runs.

A bucket is all-reduced as soon as its last gradient has arrived, so communication hides behind the
rest of the backward pass. Buckets leave in one fixed order on every rank, whatever the order in which
gradients arrive, and each leaves once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.strategy.base import World

BUCKET_ELEMENTS = 8 * 2**20
"""32 MiB of fp32, near the 25 MB of torch's DDP: long enough to use a link's bandwidth, short enough
that the last bucket, which nothing hides, is a small part of a model."""


class Buckets:
    """fp32 sums over micro-batches, then over ranks, of the gradients of `parameters`."""

    def __init__(self, world: World, parameters: Sequence[nn.Parameter]) -> None:
        self._world = world
        self._flats: list[Tensor] = []
        self._sizes: list[int] = []  # parameters in each bucket
        self._bucket: list[int] = [0] * len(parameters)
        self.views: list[Tensor] = [torch.empty(0)] * len(parameters)  # each shaped like its parameter
        self._missing: list[int] = []  # gradients not yet arrived; empty while nothing is reduced
        self._leaving: list[dist.Work] = []
        # gradients arrive roughly from the last parameter to the first
        group: list[int] = []
        for index in reversed(range(len(parameters))):
            group.append(index)
            if sum(parameters[i].numel() for i in group) >= BUCKET_ELEMENTS or index == 0:
                self._add(group, parameters)
                group = []
        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(self._arrival(index))

    def expect_last(self) -> None:
        """The next backward pass completes the sums: buckets leave from now on."""
        if self._world.size > 1:
            self._missing = list(self._sizes)

    def send_rest(self) -> None:
        """After the last backward pass: buckets that wait for a gradient that never came leave too."""
        if self._missing:
            self._missing = [0] * len(self._sizes)
            self._send()

    def wait(self) -> list[Tensor]:
        """The flat sums over all ranks and micro-batches. Raises RuntimeError if none were sent."""
        if self._world.size > 1 and len(self._leaving) != len(self._flats):
            raise RuntimeError("step() without micro(last=True): gradients are not summed over ranks")
        for work in self._leaving:
            work.wait()
        return self._flats

    def clear(self) -> None:
        """Zero sums, for the next optimizer step."""
        self._missing, self._leaving = [], []
        if self._flats:
            torch._foreach_zero_(self._flats)

    def _add(self, group: Sequence[int], parameters: Sequence[nn.Parameter]) -> None:
        sizes = [parameters[index].numel() for index in group]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=self._world.device)
        for index, view in zip(group, flat.split(sizes), strict=True):
            self.views[index] = view.view(parameters[index].shape)
            self._bucket[index] = len(self._flats)
        self._flats.append(flat)
        self._sizes.append(len(group))

    def _arrival(self, index: int) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            bucket = self._bucket[index]
            if bucket < len(self._leaving):
                raise RuntimeError(
                    "a second backward pass inside micro(last=True): its sums are on their way"
                )
            assert parameter.grad is not None
            self.views[index].add_(parameter.grad)
            parameter.grad = None
            if self._missing:
                self._missing[bucket] -= 1
                self._send()

        return add

    def _send(self) -> None:
        while len(self._leaving) < len(self._flats) and self._missing[len(self._leaving)] <= 0:
            flat = self._flats[len(self._leaving)]
            self._leaving.append(dist.all_reduce(flat, op=dist.ReduceOp.SUM, async_op=True))
