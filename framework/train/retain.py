"""What a run has forgotten so far: the loss on general text against that of the model it started from.

The start model is asked before training, and the loss that it gave each row is kept in the checkpoint; so
nothing but the trained model is in memory, and a resumed run goes on with the same numbers. So are its right
and wrong answers, where questions are asked (`Questions`). Its likeliest tokens, which KL(start || model)
needs, are asked for again by a resumed run, which holds the start weights at first. Rows are added up in fp64
in one order and passes are cut alike whatever the world size: every rank decides alike.

Letters: n rows of a stratum, row i with t_i trained tokens and d_i nats more than the start model gave it.
change = sum d_i / sum t_i, a ratio estimate whose variance over rows is
n / (n - 1) * sum (d_i - change * t_i)^2 / (sum t_i)^2 (Cochran 1977, section 6.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from framework.batch import Batch
from framework.losses.items import Items
from framework.strategy.base import Engine, World
from framework.train.trainer import Report

NORMAL = 1.959964  # quantile 0.975 of the normal distribution
FEWEST = 2  # rows without which there is no bound


@dataclass(frozen=True)
class Stratum:
    """A kind of text whose retention is measured by itself."""

    name: str
    rows: Sequence[int]  # its numbers among the rows of the probe
    identity: str  # changes with the rows, their tokens and what decides how they are scored


@dataclass(frozen=True)
class Probe:
    """The rows to score, on this rank. `sources` of a batch are numbers of rows, -1 in fills."""

    strata: Sequence[Stratum]
    micros: Sequence[Batch]
    again: Sequence[Batch]  # the same rows cut otherwise: how much the cut alone changes


@dataclass(frozen=True)
class Change:
    """Change of held-out loss against the start model, in nats a token, with its 95 % interval."""

    loss: float
    change: float
    half: float  # half the width of the interval; inf for a single row
    rows: int
    tokens: int

    @property
    def low(self) -> float:
        return self.change - self.half

    @property
    def high(self) -> float:
        return self.change + self.half


Score = Sequence[float]
"""Of one row: nats, trained tokens, and where it is known KL(start || model) over them, in nats."""


class Measure(Protocol):
    """An objective that may also say, as the metric `kl`, how far the model is from the start."""

    def __call__(self, engine: Engine, batch: Batch) -> Items: ...

    def remember(self, engine: Engine, batch: Batch) -> Items:
        """The same of the start model, remembered for `kl`."""


@dataclass(frozen=True)
class Fall:
    """By how much the share answered right of the same questions has fallen since the start model."""

    right: float  # share now; NaN where none could be judged
    right_to_wrong: int
    wrong_to_right: int
    questions: int  # judged both times
    low: float  # of the fall: ends of its 95 % interval
    high: float
    noise: float  # by how much the start model differed when it was asked again

    @property
    def change(self) -> float:
        """The fall itself, a share from -1 to 1; 0 of no question."""
        return (self.right_to_wrong - self.wrong_to_right) / max(self.questions, 1)


@dataclass(frozen=True)
class Found:
    """What a look has found, by stratum."""

    changes: Mapping[str, Change]
    noise: Mapping[str, float]  # of `changes`
    divergences: Mapping[str, Change] = field(default_factory=dict)  # KL(start || model), nats a token
    falls: Mapping[str, Fall] = field(default_factory=dict)  # none where no question was asked


class Questions(Protocol):
    """Asks the model of the moment what the start model was asked. Collective; alike on all ranks."""

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Before the first step, with the start weights in the engine; `saved` as `state_dict` gave it."""

    def due(self, step: int) -> bool:
        """Whether the look after `step` optimizer steps asks."""

    def __call__(self, *, start: bool = False) -> Mapping[str, Fall]:
        """What the model as it is now has lost; with `start` the start model against itself, not asked."""

    def state_dict(self) -> dict[str, Any]: ...


class Decide(Protocol):
    """Acts on what a look has found; it may change what is trained on next. Alike on all ranks."""

    def __call__(self, step: int, found: Found) -> tuple[Mapping[str, float], Sequence[Report]]:
        """(metrics beside those of the look, lines) of a look after `step` steps."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def compare(start: Sequence[Score], now: Sequence[Score]) -> Change | None:
    """Paired over rows; rows that the start model gave no finite loss are left out. None of no row."""
    pairs = [(a[0], b[0], b[1]) for a, b in zip(start, now, strict=True) if math.isfinite(a[0]) and b[1] > 0]
    tokens = math.fsum(t for _, _, t in pairs)
    if not pairs:
        return None
    change = math.fsum(b - a for a, b, _ in pairs) / tokens if _finite(pairs) else math.nan
    half = math.inf
    if len(pairs) >= FEWEST:
        squares = math.fsum((b - a - change * t) ** 2 for a, b, t in pairs) if _finite(pairs) else math.nan
        half = quantile(len(pairs) - 1) * math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / tokens
    loss = math.fsum(b for _, b, _ in pairs) / tokens if _finite(pairs) else math.nan
    return Change(loss, change, half, len(pairs), int(tokens))


def diverged(now: Sequence[Score]) -> Change | None:
    """The mean KL over tokens with its interval over rows; None where it is not known."""
    if not all(len(row) > 2 for row in now):
        return None
    return compare([(0.0, row[1]) for row in now], [(row[2], row[1]) for row in now])


def _finite(pairs: Sequence[tuple[float, float, float]]) -> bool:
    return all(math.isfinite(now) for _, now, _ in pairs)


def quantile(freedom: int) -> float:
    """Quantile 0.975 of Student's t: exact for 1 to 3, else Cornish and Fisher's series, to 0.1 %."""
    if freedom <= 3:
        return (12.7062, 4.30265, 3.18245)[freedom - 1]
    z, v = NORMAL, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def relative(change: float) -> float:
    """exp(change) - 1: by how much perplexity rose. 0.01 is one percent."""
    return math.expm1(change) if change < 700 else math.inf


def score(
    engine: Engine, objective: Callable[[Engine, Batch], Items], micros: Sequence[Batch], rows: int
) -> list[Score]:
    """A score of every row, alike on every rank. Collective."""
    mine: dict[int, list[float]] = {}
    with engine.inference():
        for batch in micros:
            items = objective(engine, batch)
            weights = items.weight.detach().double().cpu()
            kinds = [items.loss] + [items.metrics[name] for name in ("kl",) if name in items.metrics]
            values = [(k.detach().double().cpu() * weights).where(weights > 0, 0.0) for k in kinds]
            owners = batch.sources[batch.segments.cpu()]  # [K] the row of each trained token
            for row in batch.sources[batch.sources >= 0].unique().tolist():
                chosen = owners == row
                nats, *others = (float(value[chosen].sum()) for value in values)
                mine[row] = [nats, float(weights[chosen].sum()), *others]
    known: dict[int, list[float]] = {}
    for rank in engine.world.gather(list(mine.items())):
        known |= {int(row): values for row, values in rank}
    return [known[row] for row in range(rows)]


@dataclass(frozen=True)
class Cadence:
    """When to look: at the start, every `every` steps, every `dense` in the first tenth, and at the end."""

    steps: int
    every: int
    dense: int = 10

    def due(self, step: int) -> bool:
        """Whether a look is due after `step` optimizer steps."""
        early = self.dense > 0 and step * 10 <= self.steps and step % self.dense == 0
        return step in (0, self.steps) or early or step % self.every == 0

    def number(self, step: int) -> int:
        """Looks after the one at the start, up to `step` and with it; the one at the end is not counted."""
        early = min(step, self.steps // 10)
        both = early // math.lcm(self.every, self.dense) if self.dense else 0
        return step // self.every + (early // self.dense - both if self.dense else 0)

    def looks(self) -> int:
        """How many there are in the whole run."""
        early = range(0, self.steps // 10 + 1, self.dense) if self.dense else range(0)
        return len({0, self.steps, *range(0, self.steps, self.every), *early})


class Retention:
    """Watches a run, see `trainer.Watch`. `decide` is told what was found and may act on it.

    `told` are lines to report with the first look.
    """

    def __init__(
        self,
        engine: Engine,
        probe: Probe,
        objective: Measure,
        cadence: Cadence,
        *,
        questions: Questions | None = None,
        decide: Decide | None = None,
        told: Sequence[Report] = (),
    ) -> None:
        self.engine, self.probe, self.objective, self.cadence = engine, probe, objective, cadence
        self.questions, self.decide, self._told = questions, decide, list(told)
        self.looked: int | None = None
        self.latest: dict[str, Change] = {}
        self.divergences: dict[str, Change] = {}  # KL(start || model), nats a token
        self.noise: dict[str, float] = {}
        self.falls: dict[str, Fall] = {}  # empty after a look that did not ask
        self._start: dict[str, dict[str, Any]] = {}  # by stratum: its identity, and a score for each row

    @property
    def world(self) -> World:
        return self.engine.world

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from `saved`; what it lacks is asked of the engine, which holds the start weights."""
        if saved is not None:
            self.looked = saved["looked"]
            wanted = {s.name: s.identity for s in self.probe.strata}
            known = saved["start"].items()
            self._start = {n: dict(one) for n, one in known if wanted.get(n) == one["identity"]}
            self.latest = {n: Change(**c) for n, c in saved["latest"].items() if n in self._start}
            self.divergences = {
                n: Change(**c) for n, c in saved.get("divergences", {}).items() if n in self._start
            }
            self.falls = {n: Fall(**f) for n, f in saved.get("falls", {}).items()}
            if self.decide is not None and "decide" in saved:
                self.decide.load_state_dict(saved["decide"])
        if self.questions is not None:
            self.questions.begin(None if saved is None else saved.get("questions"))
        first = self._score(self.probe.micros, self.objective.remember)
        missing = [s for s in self.probe.strata if s.name not in self._start]
        if missing:
            second = self._score(self.probe.again, self.objective)
            for stratum in missing:
                scores = [first[row][:2] for row in stratum.rows]
                noise = compare(scores, [second[row] for row in stratum.rows])
                self._start[stratum.name] = {
                    "identity": stratum.identity,
                    "scores": scores,
                    "noise": abs(noise.change) if noise else math.inf,
                }
        self.noise = {name: one["noise"] for name, one in self._start.items()}

    def due(self, step: int) -> bool:
        """Whether `look` is to be called after `step` steps; not twice after the same."""
        return self.looked != step and self.cadence.due(step)

    def look(self, step: int) -> list[Report]:
        """Measure every stratum and act on it. Collective; alike on all ranks."""
        self.looked = step
        if step == 0:  # the start model is the start model
            self._take(
                {name: [(*one, 0.0) for one in start["scores"]] for name, start in self._start.items()}
            )
            self.falls = {} if self.questions is None else dict(self.questions(start=True))
        else:
            self.measure(ask=self.questions is not None and self.questions.due(step))
        told, self._told = self._told, []
        if self.decide is None:
            return [*told, ("retain", self.line())]
        metrics, lines = self.decide(step, self.found)
        return [*told, ("retain", {**self.line(), **metrics}), *lines]

    @property
    def found(self) -> Found:
        """What was found last."""
        return Found(self.latest, self.noise, self.divergences, self.falls)

    def measure(self, *, ask: bool = True) -> None:
        """Measure every stratum as the engine is now, and do nothing about it. Collective.

        With `ask` the questions, too, where there are any.
        """
        scores = self._score(self.probe.micros, self.objective)
        self._take({s.name: [scores[row] for row in s.rows] for s in self.probe.strata})
        self.falls = dict(self.questions()) if ask and self.questions is not None else {}

    def _take(self, now: Mapping[str, Sequence[Score]]) -> None:
        found = {s.name: compare(self._start[s.name]["scores"], now[s.name]) for s in self.probe.strata}
        self.latest = {name: change for name, change in found.items() if change is not None}
        self.divergences = {name: moved for name in self.latest if (moved := diverged(now[name])) is not None}

    def line(self) -> dict[str, float]:
        """What was found last, as metrics."""
        line: dict[str, float] = {}
        for name, found in self.latest.items():
            line |= {
                f"{name}/loss": found.loss,
                f"{name}/change": found.change,
                f"{name}/low": found.low,
                f"{name}/high": found.high,
                f"{name}/relative": relative(found.change),
                f"{name}/relative_high": relative(found.high),
                f"{name}/noise": self.noise[name],
                f"{name}/units": float(found.tokens),
            }
            if name in self.divergences:
                line |= {f"{name}/kl": self.divergences[name].change}
                line |= {f"{name}/kl_high": self.divergences[name].high}
        for name, fall in self.falls.items():
            line |= {
                f"{name}/right": fall.right,
                f"{name}/right_to_wrong": float(fall.right_to_wrong),
                f"{name}/wrong_to_right": float(fall.wrong_to_right),
                f"{name}/questions": float(fall.questions),
                f"{name}/fall": fall.change,
                f"{name}/fall_low": fall.low,
                f"{name}/fall_high": fall.high,
                f"{name}/fall_noise": fall.noise,
            }
        return line

    def state_dict(self) -> dict[str, Any]:
        """What the start model said, and the last look; JSON."""
        latest = {name: vars(change) for name, change in self.latest.items()}
        moved = {name: vars(change) for name, change in self.divergences.items()}
        state = {"looked": self.looked, "start": self._start, "latest": latest, "divergences": moved}
        if self.questions is not None:
            falls = {name: vars(fall) for name, fall in self.falls.items()}
            state |= {"questions": self.questions.state_dict(), "falls": falls}
        return state if self.decide is None else {**state, "decide": self.decide.state_dict()}

    def _score(self, micros: Sequence[Batch], objective: Callable[[Engine, Batch], Items]) -> list[Score]:
        rows = sum(len(stratum.rows) for stratum in self.probe.strata)
        return score(self.engine, objective, micros, rows)
