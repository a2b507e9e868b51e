"""The certificate: cells run on real processes and compared with one fp32 process, cell by cell.

The reference of supervised training is plain transformers and torch, an example at a time; of other stages
our own run in one process with nothing spread, packed or cut. A cell in bf16 is compared with the same, and
may be about as far from it as one process in bf16. What the configuration refuses is a cell, too, with its
reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from framework.cluster.crew import Crew, CrewError
from framework.config import cells, compose, measured
from framework.config.cells import Cell
from framework.errors import ConfigError

NAMES = ("loss", "gradient", "weights")
BOUND = 1e-5
"""Largest relative difference of each that is agreement in fp32: some hundred roundings. AdamW runs with eps
1e-6, or entries whose gradient is rounding alone would take full steps."""

TIMES = 2.0
"""In bf16 a cell may be that many times as far from the fp32 reference as one process in bf16 that spreads
nothing (the furthest of packed, padded, whole and cut): what is lost beyond that is lost by spreading. Where
AdamW turns rounding into steps, right programs are not equally far from the truth, but about."""

MOST = {"loss": 2e-2, "gradient": 5e-2, "weights": 2e-2}
"""In bf16 no run of full fine-tuning may be further from fp32, alone or not, nor an adapter's first gradient:
8 bits of mantissa, some layers. What an adapter holds is nothing but what was learnt, rounding included."""

PATIENCE_S = 600
"""For one cell: many times what the slowest takes, and an end to one that hangs."""

Measure = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """What became of a cell: "agrees", "disagrees", "refused", "not compared" or "failed"."""

    cell: Cell
    verdict: str
    differences: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self.cell), **asdict(self), "cell": str(self.cell)}


def refusal(cell: Cell, place: Path, model: Path, *, device: str) -> str | None:
    """Why the configuration refuses a cell, None if it does not."""
    try:
        compose.compose(cells.line(cell, place, model, device=device))
    except ConfigError as error:
        return str(error)
    return None


class Certificate:
    """Runs cells on processes that are kept between them. `close` ends these."""

    def __init__(self, place: Path, model: Path, *, device: str = "cpu", devices: int | None = None) -> None:
        """`place` is filled by `specimens.write`; `devices` limits the ranks where each needs one."""
        self._place, self._model = place, model
        self._device, self._devices = device, devices
        self._crews: dict[int, Crew] = {}
        self._references: dict[Cell, dict[str, Any]] = {}
        self._bounds: dict[Cell, Mapping[str, float]] = {}

    def run(self, wanted: Iterable[Cell], measure: Measure = measured.measure) -> Iterator[Found]:
        """What becomes of each cell, one after the other; `measure` runs on every rank of a cell."""
        for cell in wanted:
            began = time.perf_counter()
            found = self._one(cell, measure)
            yield replace(found, seconds=time.perf_counter() - began)

    def close(self) -> None:
        while self._crews:
            self._crews.popitem()[1].kill()

    def _one(self, cell: Cell, measure: Measure) -> Found:
        if (why := refusal(cell, self._place, self._model, device=self._device)) is not None:
            return Found(cell, "refused", why=why)
        if self._devices is not None and cell.ranks > self._devices:
            return Found(cell, "not compared", why=f"{cell.ranks} ranks and {self._devices} devices")
        if cell.precision != "fp32" and cell.stage in cells.WRITING:
            return Found(cell, "not compared", why="rounding changes a word, and every word after it")
        try:
            expected = self._reference(cells.reference(cell))
            bounds = (
                dict.fromkeys(NAMES, BOUND) if cell.precision == "fp32" else self._rounded(cell, expected)
            )
            return judged(cell, self._measured(cell, measure), expected, bounds)
        except (CrewError, ValueError) as error:
            return Found(cell, "failed", why=str(error))

    def _reference(self, cell: Cell) -> dict[str, Any]:
        if cell not in self._references:
            plain = cell.stage == "sft"
            ranks = self._measured(cell, measured.plain if plain else measured.measure)
            gradient = ranks[0]["gradient"] if plain else measured.whole(ranks)
            self._references[cell] = {**ranks[0], "gradient": gradient}
        return self._references[cell]

    def _rounded(self, cell: Cell, expected: Mapping[str, Any]) -> Mapping[str, float]:
        """How far from fp32 a cell of less precision may be, by what one process of that precision is."""
        kind = cells.reference(cell)
        if kind not in self._bounds:
            alone = [
                replace(kind, precision=cell.precision, packing=packing, accumulation=accumulation)
                for packing, accumulation in product((False, True), repeat=2)
            ]
            apart = [differences(self._measured(one, measured.measure), expected) for one in alone]
            bounds = {name: TIMES * max(each[name] for each in apart) for name in NAMES}
            capped = NAMES if cell.adapter == "full" else ("gradient",)
            self._bounds[kind] = bounds | {name: min(bounds[name], MOST[name]) for name in capped}
        return self._bounds[kind]

    def _measured(self, cell: Cell, measure: Measure) -> list[dict[str, Any]]:
        line = cells.line(cell, self._place, self._model, device=self._device)
        if cell.ranks not in self._crews:
            self._crews[cell.ranks] = Crew(cell.ranks, device=self._device, preload=[measured.__name__])
        try:
            return self._crews[cell.ranks].run(measure, line, steps=cells.STEPS, timeout_s=PATIENCE_S)
        except CrewError:
            self._crews.pop(cell.ranks).kill()
            raise


def judged(
    cell: Cell,
    ranks: Sequence[Mapping[str, Any]],
    expected: Mapping[str, Any],
    bounds: Mapping[str, float],
) -> Found:
    """A cell's ranks beside the reference, from which each of `NAMES` may be so far."""
    found = differences(ranks, expected)
    over = [name for name, bound in bounds.items() if not found[name] <= bound]
    why = [f"{name} is {found[name]:.1e} apart, and may be {bounds[name]:.1e}" for name in over]
    if any(rank["losses"] != ranks[0]["losses"] for rank in ranks):
        why.append("ranks report other losses")
    if cell.precision == "fp32" and ranks[0]["tokens"] != expected["tokens"]:
        why.append("other answers were written")
    return Found(cell, "disagrees" if why else "agrees", found, bounds, "; ".join(why))


def differences(ranks: Sequence[Mapping[str, Any]], expected: Mapping[str, Any]) -> dict[str, float]:
    """How far a cell is from the reference, by `NAMES`."""
    return {
        "loss": _apart(ranks[0]["losses"], expected["losses"]),
        "gradient": apart(measured.whole(ranks), expected["gradient"]),
        "weights": apart(ranks[0]["weights"], expected["weights"]),
    }


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The norm of the difference over the norm of what is expected, over all tensors together."""
    if found.keys() != expected.keys():
        raise ValueError(f"other tensors: {', '.join(sorted(found.keys() ^ expected.keys()))}")
    difference = sum(float((found[n].double() - w.double()).square().sum()) for n, w in expected.items())
    size = sum(float(w.double().square().sum()) for w in expected.values())
    return float((difference / size) ** 0.5)


def _apart(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference of any step over the largest loss of the run.

    Over each step's own would divide rounding by nothing where advantages of mean zero cancel.
    """
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) / max(map(abs, expected))
