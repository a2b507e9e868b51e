"""Holds forgetting to a budget by the amount of replay: a controller that is arithmetic and nothing else.

Dual ascent on the constraint "the upper 95 % bound of what kind s of text has forgotten is at most b":

    u_s      = (bound_s - aim * b) / b, smoothed, and 0 within the noise of the measurement
    lambda_s = max(0, lambda_s + gain * u_s)
    amount   = most * (1 - exp(-(sum of lambda_s + push * max u_s where above 0)))

`aim` below 1 leaves room for what a look may be off. It starts high and lets go slowly while there is room:
what is not measured yet may still be forgotten. The amount moves on a grid, so that rounding in the last
digits of a loss cannot change what is trained on; and within limits a look, upwards faster than down. Where
it is at its most and the bound is not met for `patience` looks, the budget cannot be met.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

GRID = 400  # amounts are whole fractions of the largest
NEAR = 0.95  # of the most: as good as there
LARGEST = 1.0  # excess over the budget, in budgets, that counts at once
HELD = ("kept", "unresolvable", "infeasible")  # verdicts, the best first


@dataclass(frozen=True)
class Reading:
    """What one look found of one kind of text, in the unit of the budget."""

    change: float
    high: float  # upper end of the 95 % interval
    noise: float  # how much two measurements of the same model differ
    rows: int


@dataclass(frozen=True)
class Rules:
    """What is asked for and how it is pursued."""

    budget: float
    start: float  # amount of replay to begin with
    most: float
    aim: float = 0.8  # share of the budget that is used where there is no need for more
    gain: float = 0.3
    push: float = 0.3
    memory: float = 0.5  # weight of what was smoothed before, in [0, 1)
    foresight: float = 1.0  # looks ahead: what smoothing lags behind
    rise: float = 0.15  # most that the amount may go up in a look, of `most`
    fall: float = 0.12  # most that it may go down, of itself
    patience: int = 4
    ease: float = 9.0  # budgets that are allowed besides at the very start
    settled: float = 0.6  # of the run, from when on the budget itself rules

    def __post_init__(self) -> None:
        if not (self.budget > 0 and 0 < self.start <= self.most):
            raise ValueError(f"budget={self.budget} and start={self.start} of most={self.most}: not in order")

    def allowed(self, progress: float) -> float:
        """The budget when `progress` of the run is done."""
        return self.budget * (1 + self.ease * max(0.0, 1 - progress / self.settled))


@dataclass
class State:
    """All that a controller remembers; JSON."""

    amount: float
    multipliers: dict[str, float] = field(default_factory=dict)
    smoothed: dict[str, float] = field(default_factory=dict)
    pinned: int = 0  # looks in a row at the most with the budget not met
    told: bool = False  # that it cannot be met


@dataclass(frozen=True)
class Decision:
    """What one look leads to."""

    amount: float
    before: float
    binding: str | None  # the kind of text that asks for most
    infeasible: bool  # known since this look

    @property
    def moved(self) -> bool:
        return self.amount != self.before


@dataclass(frozen=True)
class Verdict:
    """Whether the budget was kept, by the last look."""

    status: str  # kept | unresolvable | infeasible
    binding: str | None  # the kind of text that decided it
    high: float  # of that kind


class Controller:
    """Decides on the amount of replay, look by look. `load` takes what `state_dict` gave."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.state = State(amount=rules.start)

    def decide(self, readings: Mapping[str, Reading], *, progress: float = 1.0) -> Decision:
        """The amount from now on, `progress` of the run being done; readings of no kind change nothing."""
        rules, state, before = self.rules, self.state, self.state.amount
        if not readings:
            return Decision(before, before, None, False)
        self._seed(readings)
        budget = rules.allowed(progress)
        excess = {name: self._excess(name, reading, budget) for name, reading in readings.items()}
        at_most = before >= NEAR * rules.most
        for name, u in excess.items():
            step = 0.0 if at_most and u > 0 else rules.gain * u  # no winding up against the stop
            state.multipliers[name] = max(0.0, state.multipliers.get(name, 0.0) + step)
        binding = max(excess, key=lambda name: (excess[name], state.multipliers[name]))
        push = rules.push * max(0.0, excess[binding])
        wanted = rules.most * -math.expm1(-(sum(state.multipliers.values()) + push))
        wanted = rules.most if wanted >= NEAR * rules.most else wanted
        state.amount, held = self._limited(wanted, before)
        if held:
            self._agree(state.amount, binding)
        unmet = at_most and state.smoothed.get(binding, math.inf) > budget + readings[binding].noise
        state.pinned = state.pinned + 1 if unmet else 0
        news = state.pinned >= rules.patience and not state.told
        state.told = state.told or news
        return Decision(state.amount, before, binding, news)

    def verdict(self, readings: Mapping[str, Reading]) -> Verdict:
        """Of the last look. A bound over the budget by no more than the noise counts as kept."""
        worst = Verdict("kept", None, -math.inf)
        for name, reading in readings.items():
            status = "kept"
            if not reading.high <= self.rules.budget + reading.noise:  # also where it is no number
                status = "unresolvable" if reading.change <= self.rules.budget else "infeasible"
            here = (HELD.index(status), reading.high if math.isfinite(reading.high) else math.inf)
            if here > (HELD.index(worst.status), worst.high):
                worst = Verdict(status, name, here[1])
        return worst

    def state_dict(self) -> dict[str, Any]:
        """The state, to go on from exactly."""
        return asdict(self.state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.state = State(**state)

    def _seed(self, names: Mapping[str, Reading]) -> None:
        """At first the multipliers are such that they ask for the amount that is there."""
        if not self.state.multipliers:
            self.state.multipliers = dict.fromkeys(names, self._total(self.rules.start) / len(names))

    def _excess(self, name: str, reading: Reading, budget: float) -> float:
        """u_s, between -1 and LARGEST; a diverged model counts as LARGEST."""
        aim = self.rules.aim * budget
        high = reading.high if math.isfinite(reading.high) else reading.change
        if not math.isfinite(high):
            return LARGEST
        last = self.state.smoothed.get(name, high)
        smoothed = self.rules.memory * last + (1 - self.rules.memory) * high
        self.state.smoothed[name] = smoothed
        if min(last, smoothed) > 0 and abs(smoothed - last) > reading.noise:
            # it goes on as it went: what is being learnt again needs no more replay
            smoothed *= min(max(smoothed / last, 0.5), 2.0) ** self.rules.foresight
        if abs(smoothed - aim) <= reading.noise:
            return 0.0
        return min(max((smoothed - aim) / budget, -1.0), LARGEST)

    def _limited(self, wanted: float, before: float) -> tuple[float, bool]:
        """On the grid and within what one look may move; and whether that is less of a move than wanted."""
        rules = self.rules
        low, high = before * (1 - rules.fall), min(before + rules.rise * rules.most, rules.most)
        amount = min(max(wanted, low), high)
        whole = math.floor if amount < before else math.ceil  # rounding alone would hold small moves up
        steps = min(max(whole(round(amount / rules.most * GRID, 6)), 0), GRID)
        return steps / GRID * rules.most, amount != wanted

    def _agree(self, amount: float, binding: str) -> None:
        """Multipliers that ask for `amount`: they must not run ahead of a move that was held up."""
        multipliers = self.state.multipliers
        now, total = sum(multipliers.values()), self._total(amount)
        for name in multipliers:
            multipliers[name] *= total / now if now > 0 else 0.0
        if now <= 0:
            multipliers[binding] = total

    def _total(self, amount: float) -> float:
        """The sum of multipliers that asks for `amount`."""
        return -math.log1p(-min(amount / self.rules.most, NEAR))


def resolvable(rows: int) -> bool:
    """Whether so many rows can bound a change by less than itself, when they differ as much as they change.

    The interval's half width is then t / sqrt(n) of the change (Student's t of n - 1 degrees), which falls
    below 1 at n = 7.
    """
    return rows >= 7
