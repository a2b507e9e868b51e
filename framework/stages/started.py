"""Supervised losses that weigh tokens or samples by what the start model makes of them.

It is asked once, before training, for the log-probability of every trained token; so no second model is in
memory. Letters: K trained positions, S segments.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from framework.batch import Batch
from framework.losses.inputs import inputs
from framework.losses.items import Items
from framework.losses.reweight import sample_weights
from framework.stages import segments
from framework.stages.reference import Reference
from framework.stages.sft import TokenObjective, by_source
from framework.strategy.base import World

STARTED = ("start_logps", "sample_weights")
"""What such a loss asks for by parameter name, [K] fp32."""


class StartedObjective(TokenObjective):
    """A forward pass, then a loss per trained token that also names one of `STARTED`.

    `start` answers for the start model, `scale` is (median, mean) of `losses.reweight.sample_weights`. Rows
    of the sources from `own` on are rehearsed: they count as they are, whatever the start model says of them.
    """

    def __init__(
        self,
        loss: Callable[..., Items],
        start: Reference,
        scale: tuple[float, float],
        *,
        own: int,
        sources: Sequence[str] = (),
    ) -> None:
        super().__init__(loss, sources)
        self.start, self.scale, self.own = start, scale, own
        self.wanted = inputs(loss) & frozenset(STARTED)

    def __call__(self, engine, batch: Batch) -> Items:  # type: ignore[no-untyped-def]
        device = engine.world.device
        (start,) = self.start([batch])
        rehearsed = (batch.sources >= self.own)[batch.segments.cpu()].to(device)
        given: dict[str, Tensor] = {}
        if "start_logps" in self.wanted:
            given["start_logps"] = start.to(device).masked_fill(rehearsed, 0.0)
        if "sample_weights" in self.wanted:
            weights = sample_weights(means(start, batch), *self.scale).float().to(device)
            given["sample_weights"] = weights[batch.segments.to(device)].masked_fill(rehearsed, 1.0)
        batch = batch.to(device)
        outputs = engine(batch, needs=self.needs)
        given |= {"logps": outputs.logps, "weight": batch.weights}
        given |= {name: getattr(outputs, name) for name in self.needs}
        return by_source(self.loss(**given), batch, self.sources)


def means(start: Tensor, batch: Batch) -> Tensor:
    """[S] fp64 on the CPU: the start model's mean loss in nats over the trained tokens of each segment."""
    where = batch.segments.cpu()
    total = torch.zeros(segments.count(batch), dtype=torch.float64).index_add_(
        0, where, -start.double().cpu()
    )
    return total / torch.bincount(where, minlength=len(total)).clamp(min=1)


def scale_of(start: Reference, micros: Iterable[Batch], world: World) -> tuple[float, float]:
    """(median, mean) over the samples in all ranks' `micros`, alike on every rank. Collective."""
    mine: list[float] = []
    for batch in micros:
        (logps,) = start([batch])
        mine += means(logps, batch)[batch.sources >= 0].tolist()
    nats = sorted(value for rank in world.gather(mine) for value in rank)
    median = max(statistics.median(nats), 1e-6)  # a start model that knows all of it weighs all alike
    return median, math.fsum(math.exp(-value / median) for value in nats) / len(nats)
