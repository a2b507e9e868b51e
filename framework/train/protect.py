"""Keeps the weights near the ones that training began with, under any strategy: on masters, slice by slice.

    pull       w <- start + (w - start) / (1 + lr c F) after each update: the proximal step of
               c / 2 * sum F (w - start)^2, decoupled from AdamW's moments as its weight decay is. With F = 1
               it is L2-SP (Li et al. 2018, arXiv 1802.01483), with F the diagonal of the Fisher information
               EWC (Kirkpatrick et al. 2017, arXiv 1612.00796). No c is too large for it.
    average    a <- d a + (1 - d) w after each update, to be handed out in the place of w.

Every rank does this to all that it holds, so the result cannot depend on how the model is spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from framework.strategy.base import MASTER, Engine, EngineState, Read, Shard, Slice, World

AVERAGE, IMPORTANCE = "average", "importance"
"""Names of these values in a checkpoint, beside the master and AdamW's moments."""


@dataclass(frozen=True)
class Kept:
    """A copy of one value of a slice."""

    start: int  # first element of the flattened parameter
    values: Tensor  # [n] fp32


Values = Mapping[str, Sequence[Kept]]
"""By parameter, in the order of `Engine.held`."""


def copied(engine: Engine, which: str = MASTER, *, device: torch.device | None = None) -> Values:
    """A value of all that this rank holds, as it is now, on `device` or where it is. Collective."""
    with engine.held() as held:
        return {
            name: [
                Kept(each.start, each.values[which].to(device or each.values[which].device, copy=True))
                for each in slices
            ]
            for name, slices in held.items()
        }


def put(engine: Engine, values: Values) -> None:
    """Make `values` the masters of the parameters that it names. Collective."""
    with engine.held() as held:
        for name, parts in values.items():
            for part, own in zip(parts, held[name], strict=True):
                own.values[MASTER].copy_(part.values)


def found(values: Values, name: str, start: int, stop: int) -> Tensor:
    """Elements start to stop of a parameter, which must be this rank's."""
    for part in values[name]:
        if part.start <= start and stop <= part.start + part.values.numel():
            return part.values[start - part.start : stop - part.start]
    raise ValueError(f"{name}: this rank does not hold elements {start} to {stop}")


class Protected:
    """An engine whose updates end with a pull to the start weights, or are averaged, or both.

    To be made while `engine` holds the start weights. `pull` is c above, 0 for none, of the parameters that
    `pulled` says; `importance` is F, None for 1; `average` is d, None for no average. Bytes more per trained
    element of a rank: 4 each for the pull, an importance and an average.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        pull: float = 0.0,
        importance: Values | None = None,
        average: float | None = None,
        pulled: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.engine = engine
        self.world: World = engine.world
        self.trained = engine.trained
        self.pull, self.decay = pull, average
        self.average = None if average is None else copied(engine)
        self._importance = importance
        self._start = {n: parts for n, parts in copied(engine).items() if pulled(n)} if pull else {}

    def step(self, *, lr: float, max_grad_norm: float | None) -> float:
        """The engine's step, then what is said above; nothing where that step was skipped."""
        norm = self.engine.step(lr=lr, max_grad_norm=max_grad_norm)
        if math.isfinite(norm):
            with self.engine.held() as held:
                self._pull(held, lr)
                self._average(held)
        return norm

    def _pull(self, held: Mapping[str, Sequence[Slice]], lr: float) -> None:
        for name, starts in self._start.items():
            for i, (start, own) in enumerate(zip(starts, held[name], strict=True)):
                strength: Any = lr * self.pull
                if self._importance is not None:
                    strength = self._importance[name][i].values * strength
                own.values[MASTER].sub_(start.values).div_(1.0 + strength).add_(start.values)

    def _average(self, held: Mapping[str, Sequence[Slice]]) -> None:
        for name, means in (self.average or {}).items():
            for mean, own in zip(means, held[name], strict=True):
                assert self.decay is not None
                mean.values.mul_(self.decay).add_(own.values[MASTER], alpha=1.0 - self.decay)

    @property
    def _kept(self) -> dict[str, Values]:
        """What has to be in a checkpoint, by name."""
        kept = {AVERAGE: self.average, IMPORTANCE: self._importance}
        return {which: values for which, values in kept.items() if values is not None}

    def state_dict(self) -> EngineState:
        """The engine's state with these values beside the masters."""
        state, kept = self.engine.state_dict(), self._kept

        def more(name: str, shard: Shard) -> Shard:
            stop = shard.start + shard.values[MASTER].numel()
            own = {
                w: found(values, name, shard.start, stop).to("cpu", copy=True) for w, values in kept.items()
            }
            return replace(shard, values={**shard.values, **own})

        shards = {name: [more(name, each) for each in parts] for name, parts in state.shards.items()}
        return replace(state, shards=shards)

    def load_state_dict(self, updates: int, read: Read) -> None:
        """Go on from there. The start weights are those that the engine was made with."""
        self.engine.load_state_dict(updates, read)
        for which, values in self._kept.items():
            for name, parts in values.items():
                for part in parts:
                    part.values.copy_(read(name, which, part.start, part.start + part.values.numel()))

    # ----- as the engine does it

    @property
    def updates(self) -> int:
        return self.engine.updates

    def micro(self, *, last: bool) -> AbstractContextManager[None]:
        return self.engine.micro(last=last)

    def __call__(self, batch: Any, **options: Any) -> Any:
        return self.engine(batch, **options)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def inference(self) -> AbstractContextManager[None]:
        return self.engine.inference()

    def weights(self, *, without: str | None = None) -> Iterator[tuple[str, Tensor]]:
        return self.engine.weights(without=without)

    def held(self) -> AbstractContextManager[Mapping[str, Sequence[Slice]]]:
        return self.engine.held()
