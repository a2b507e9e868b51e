"""Adds up what happened since the last log line and reduces it over ranks with one collective.

Sums stay on the device until the line is due, so metering never waits for an accelerator. Means are
weighted sums divided by weights over all ranks, never means of means.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framework.batch import Batch
from framework.losses.items import Items
from framework.strategy.base import World


class Sums:
    """Weighted sums by name over micro-batches: name -> [sum of weight * value, sum of weight]."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, items: Items, *, units: float | None = None, term: str = "") -> None:
        """Count one micro-batch in fp64, on its device, under names that begin with `term`.

        `units` is what the loss is divided by (`Batch.units`), by default the sum of weights. They differ
        where tokens are weighted by a constant, and then the loss reported is still the one minimised.

        A unit counts for a metric where its weight is positive and the metric is not NaN. The loss
        counts wherever the weight is positive, so that a NaN in it is seen.
        """
        counted = items.weight > 0
        weight = torch.where(counted, items.weight, 0).double()  # [N]
        prefix = f"{term}/" if term else ""
        self._put(f"{prefix}loss", items.total().detach().double(), _units(units, weight))
        for name, metric in items.metrics.items():
            applies = counted & ~metric.isnan()
            value = torch.where(applies, metric.double() * weight, 0).sum()
            self._put(f"{prefix}{name}", value, torch.where(applies, weight, 0).sum())

    def _put(self, name: str, value: Tensor, weight: Tensor) -> None:
        entry = self._sums.setdefault(name, [torch.zeros_like(value), torch.zeros_like(weight)])
        entry[0] = entry[0] + value
        entry[1] = entry[1] + weight

    def tolist(self) -> dict[str, list[float]]:
        """This rank's sums as plain numbers. Waits for the device."""
        return {name: [float(value), float(weight)] for name, (value, weight) in self._sums.items()}


def _units(units: float | None, weight: Tensor) -> Tensor:
    return weight.sum() if units is None else torch.full((), units, dtype=weight.dtype, device=weight.device)


def join(ranks: Sequence[Mapping[str, Sequence[float]]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means and weights by name from the sums of all ranks; what counts nowhere is left out."""
    values: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for rank in ranks:
        for name, (value, weight) in rank.items():
            values[name] += value
            weights[name] += weight
    return {name: values[name] / weights[name] for name in values if weights[name] > 0}, weights


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a CUDA device, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _shares(line: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """What each source with a loss of its own has of all trained tokens, and of all loss, in a line."""
    sources = [key[5:] for key in line if key.startswith("loss/") and f"trained_tokens/{key[5:]}" in line]
    shares: dict[str, float] = {}
    for share, part in (
        ("trained_share", {name: line[f"trained_tokens/{name}"] for name in sources}),
        ("loss_share", {name: line[f"loss/{name}"] * weights[f"loss/{name}"] for name in sources}),
    ):
        whole = sum(part.values())
        shares |= {f"{share}/{name}": value / whole for name, value in part.items() if whole > 0}
    return shares


@dataclass(frozen=True)
class Speed:
    """What work is measured in."""

    cost: Callable[[Batch], float]  # FLOPs that training on a micro-batch needs
    peak: float | None = None  # FLOP/s of one rank's device


class Meter:
    """What happened between two log lines.

    With `speed` a line tells "tflops", a rank's mean rate in 1e12 FLOP/s, and "mfu", that rate over the peak.
    """

    def __init__(self, world: World, speed: Speed | None = None) -> None:
        self.world, self.speed = world, speed
        self._start()

    def _start(self) -> None:
        self._sums = Sums()
        self._counts: dict[str, float] = defaultdict(float)
        self._latest: dict[str, float] = {}
        self._flops = 0.0
        self._clock = time.perf_counter()

    def add(self, items: Items, *, units: float | None = None, term: str = "") -> None:
        """Count one micro-batch of this rank, of the term of that name."""
        self._sums.add(items, units=units, term=term)

    def work(self, batch: Batch) -> None:
        """Count what a micro-batch of this rank costs. It must lie on the CPU, or this waits for it."""
        if self.speed is not None:
            self._flops += self.speed.cost(batch)

    def count(self, stats: Mapping[str, float]) -> None:
        """Facts of a global step, alike on all ranks: counts are added up, positions replaced.

        Positions and ratios ("data_index", "epoch", "..._share", "..._efficiency") report their
        latest value.
        """
        for name, value in stats.items():
            if name in ("data_index", "epoch") or name.endswith(("_share", "_efficiency")):
                self._latest[name] = value
            else:
                self._counts[name] += value

    def line(self) -> dict[str, Any]:
        """Means and counts since the last line. Collective, once a line; starts the next one."""
        mine = {
            "sums": self._sums.tolist(),
            "memory": peak_memory(self.world.device),
            "flops": self._flops,
            "seconds": time.perf_counter() - self._clock,
        }
        ranks = self.world.gather(mine)
        means, weights = join([rank["sums"] for rank in ranks])
        line: dict[str, Any] = {**means, **self._counts, **self._latest}
        line |= _shares(line, weights)
        line["seconds"] = max(rank["seconds"] for rank in ranks)  # the others waited for the slowest
        if "tokens" in line:
            line["tokens_per_s"] = line["tokens"] / line["seconds"]
        if self.speed is not None:
            rate = sum(rank["flops"] for rank in ranks) / len(ranks) / line["seconds"]
            line["tflops"] = rate / 1e12
            if self.speed.peak is not None:
                line["mfu"] = rate / self.speed.peak
        line["peak_memory_bytes"] = max(rank["memory"] for rank in ranks)
        self._start()
        return line

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is not training time."""
        before = time.perf_counter()
        yield
        self._clock += time.perf_counter() - before
