"""Holds forgetting to a budget by the amount of replay: a controller that is arithmetic and nothing else.

Forgetting answers to replay in proportions: from 1 % to 2 % does about as much as from 10 % to 20 %. So what
is moved is the logarithm of the amount, by the logarithm of how far the upper 95 % bound of each kind s of
text is from where it may be when the part p of the run is done:

    path     = budget * max(ease^max(0, 1 - p / settled), (rate(p) / rate(1))^0.6, at most 3)
    target_s = aim * path, less room for how far looks have been off what the ones before foretold
    z_s      = log(bound_s / target_s), 0 within the noise of the measurement
    ahead_s  = z_s + how it will have moved against the path when a change of the amount shows
    amount  <- amount * exp(gain * max_s ahead_s)

What counts is the bound at the end. The path to it falls as forgetting does under a constant share: what is
lost while the learning rate is high is learnt again as it falls, and to forbid it costs most of the replay.
The gain grows as looks run out: early there is time, and late replay loses its hold with the learning rate.
It grows more for a bound above its target, since one that ends too low has cost some replay and one that
ends too high has missed the budget; and in the last looks what gets worse is believed at once, what gets
better when it goes on. Where the end of a run goes back until the budget is kept, the wrong side is the other
(`Landing`). Where bounds are seen to answer from one look to the next the gain is less, so that a plant
without lag is not made to swing.

Amounts are on a geometric grid, so that rounding in the last digits of a loss cannot change what is trained
on, and within limits a look. Where the amount is at its most for `patience` looks and the bound, if it goes
on as it does, ends above the budget, the budget cannot be met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STEP = 0.02  # of the logarithm of the amount: 2 %, below what a look can tell apart
LOWEST = -6.0  # logarithm of the least amount over the most, 1/400; below it nothing is replayed
NEAR = 0.95  # of the most: as good as there
FARTHEST_BELOW, FARTHEST_ABOVE = -6.0, 2.0  # logarithms of bound over target that count in full
LEAP = 0.3  # most that one look may tell of the trend
ROOM = 0.3  # most that surprises may take off the target, as a logarithm
CALMS = 0.6  # what is forgotten under a constant share follows at least this power of the learning rate
CALMED = 3.0  # most budgets that are allowed for what the falling rate is yet to bring back
CLOSES, CLOSES_CAREFULLY = 0.7, 0.3  # of the distance, what one look may close where a look shows it at once
FEW = 20  # looks of a run whose end goes back, below which gentle moves come too late
HELD = ("kept", "unresolvable", "infeasible")  # verdicts, the best first


@dataclass(frozen=True)
class Reading:
    """What one look found of one kind of text, in the unit of the budget."""

    change: float
    high: float  # upper end of the 95 % interval
    noise: float  # how much two measurements of the same model differ
    rows: int

    @property
    def bound(self) -> float:
        """The upper end; of a single row, which has none, what was measured."""
        return self.high if math.isfinite(self.high) else self.change

    def over(self, budget: float) -> Reading:
        """The same as parts of a budget, so that kinds of text with budgets of their own compare."""
        return Reading(self.change / budget, self.high / budget, self.noise / budget, self.rows)


def _steady(progress: float) -> float:
    """A learning rate that does not change."""
    return 1.0


@dataclass(frozen=True)
class Rules:
    """What is asked for and how it is pursued. A gain is of the logarithm a look."""

    budget: float
    start: float  # amount of replay to begin with
    most: float
    aim: float = 0.95  # share of the budget that is used where looks can be relied on
    gain: float = 0.5  # above it the amount swings where replay shows at once
    foresight: float = 3.0  # looks: about as long as a change of the amount takes to show
    memory: float = 0.4  # weight of what was smoothed before, in [0, 1)
    rise: float = 1.8  # most that a look may multiply the amount by, while there is time
    fall: float = 4.0  # most that it may divide it by
    hurry_up: float = 30.0  # looks before the end where `gain` is that of a bound above its target
    let_go: float = 1.5  # times the gain for a bound below its target
    hurry_down: float = 8.0  # looks before the end from when on it is more
    careful: float = 20.0  # looks before the end from when on replay is let go with care
    room: float = 1.5  # deviations of a look from what was foretold, taken off the target
    side: float = 1.0  # of the target, where the end must not be: 1 above it, -1 below
    patience: int = 4
    rate: Callable[[float], float] = _steady  # by `progress`: the learning rate over that at the end
    ease: float = 10.0  # budgets that are allowed at the very start
    settled: float = 0.9  # of the run, from when on the budget itself rules
    last: float = 5.0  # looks at the end in which it rules anyhow, if less than 0.7 of the run

    def __post_init__(self) -> None:
        if not (self.budget > 0 and 0 < self.start <= self.most):
            raise ValueError(f"budget={self.budget} and start={self.start} of most={self.most}: not in order")

    def allowed(self, progress: float, spacing: float = 0.0) -> float:
        """The budget when `progress` of the run is done and looks are `spacing` of it apart."""
        settled = min(self.settled, max(1 - self.last * spacing, 0.3))
        return self.budget * max(self.ease ** max(0.0, 1 - progress / settled), self.calms(progress))

    def calms(self, progress: float) -> float:
        """By how much the falling rate alone will lower what is forgotten until the end."""
        return min(max(self.rate(progress), 1.0) ** CALMS, CALMED)

    def late(self, progress: float, left: float) -> bool:
        """Whether what nears the wrong side is to be believed at once, `left` looks before the end."""
        return left <= self.careful

    def hurry(self, ahead: float, progress: float, left: float) -> float:
        """How many times `gain` applies to a bound that far ahead, `left` looks before the end."""
        return self.hurry_up / left if ahead > 0 else max(self.let_go, self.hurry_down / left)

    def closes(self, ahead: float, left: float) -> float:
        """Of the distance, what one look may close where a look shows it at once."""
        return CLOSES_CAREFULLY if ahead < 0 and left <= self.careful else CLOSES


@dataclass(frozen=True)
class Landing(Rules):
    """Of a run whose end goes back towards its start until the budget is kept.

    One that ends above the budget ends on it, having given back some of what it learnt; one that ends below
    it has replayed too much, and there is no way on. So it is aimed beyond the budget, and from the half of
    the run on a bound that falls is believed at once. Up and down weigh alike, by what is left of the run
    and not in looks: to miss by a little is no loss, and replay that stays where it is costs the least. The
    fields for hurry and care are not read.
    """

    aim: float = 1.3
    room: float = 0.0
    side: float = -1.0

    def late(self, progress: float, left: float) -> bool:
        return progress >= 0.5

    def hurry(self, ahead: float, progress: float, left: float) -> float:
        return 0.75 / max(1 - progress, 1e-9)

    def closes(self, ahead: float, left: float) -> float:
        return CLOSES


@dataclass(frozen=True)
class ShortLanding(Rules):
    """Of such a run with a few looks, which is over before gentle moves are."""

    aim: float = 1.5


def landing(looks: int) -> type[Rules]:
    """The rules for a run of so many looks whose end goes back. docs/forgetting.md has what they come to."""
    return Landing if looks >= FEW else ShortLanding


@dataclass
class Track:
    """What is remembered of one kind of text. Logarithms of its bound over the budget or the target."""

    bound: float  # over the budget, in the last look
    smoothed: float  # over the target
    trend: float = 0.0  # of `bound`, a look
    variance: float = 0.0  # of what a look is off the trend
    together: float = 0.0  # how a move of the amount and what the next look found went together
    moves: float = 0.0  # mean square of the moves

    @property
    def response(self) -> float:
        """By how much the bound falls until the next look where the amount rises; both logarithms."""
        return max(self.together, 0.0) / (self.moves + STEP**2)


@dataclass
class State:
    """All that a controller remembers; JSON."""

    amount: float
    level: float  # the logarithm of the amount over the most, before it is put on the grid
    progress: float = 0.0  # at the last look
    move: float = 0.0  # of the level, by the last look
    tracks: dict[str, Track] = field(default_factory=dict)
    pinned: int = 0  # looks in a row at the most with the budget out of reach
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
        self.state = State(
            amount=rules.start, level=_clipped(math.log(rules.start / rules.most), LOWEST, 0.0)
        )

    def decide(self, readings: Mapping[str, Reading], *, progress: float) -> Decision:
        """The amount from now on, `progress` of the run being done; readings of no kind change nothing."""
        state, before = self.state, self.state.amount
        if not readings:
            return Decision(before, before, None, False)
        left = max(1.0, (1 - progress) / max(progress - state.progress, 1e-9))  # looks, if they go on so
        state.progress = progress
        ahead = {name: self._ahead(name, one, progress, left) for name, one in readings.items()}
        binding = max(ahead, key=lambda name: ahead[name])
        at_most = before >= NEAR * self.rules.most
        track = self.state.tracks.get(binding)
        self._move(ahead[binding], left, track.response if track else 0.0)
        unmet = at_most and self._out_of_reach(binding, readings[binding], progress, left)
        state.pinned = state.pinned + 1 if unmet else 0
        news = state.pinned >= self.rules.patience and not state.told
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
        tracks = {name: Track(**track) for name, track in state["tracks"].items()}
        self.state = State(**{**state, "tracks": tracks})

    def _ahead(self, name: str, reading: Reading, progress: float, left: float) -> float:
        """ahead_s. A diverged model counts as FARTHEST_ABOVE."""
        rules, side, found = self.rules, self.rules.side, reading.bound
        if not math.isfinite(found):
            return FARTHEST_ABOVE
        bound = max(_log(found / rules.budget), FARTHEST_BELOW)
        track = self.state.tracks.get(name)
        change = surprise = 0.0
        if track is not None:
            still = abs(found - rules.budget * math.exp(track.bound)) <= reading.noise
            change = 0.0 if still else bound - track.bound
            surprise = _clipped(change - track.trend, -LEAP, LEAP)
            track.together += 0.3 * (-change * self.state.move - track.together)
            track.moves += 0.3 * (self.state.move**2 - track.moves)
        else:
            track = Track(bound, math.nan)
        track.bound = bound
        track.trend += (1 - rules.memory) * surprise / 1.5
        track.variance += 0.2 * (surprise**2 - track.variance)
        deviation = math.sqrt(track.variance)
        room = min(rules.room * deviation, ROOM) * min(1.0, progress / rules.settled) / rules.calms(progress)
        spacing = (1 - progress) / left
        target = rules.aim * math.exp(-room) * rules.allowed(progress, spacing)
        now = 0.0
        if abs(found - target) > reading.noise:
            now = _clipped(bound - math.log(target / rules.budget), FARTHEST_BELOW, FARTHEST_ABOVE)
        last = now if math.isnan(track.smoothed) else track.smoothed
        track.smoothed = rules.memory * last + (1 - rules.memory) * now
        self.state.tracks[name] = track
        looks = min(left, rules.foresight / (1 + 3 * track.response))
        then = rules.allowed(progress + spacing * looks, spacing)
        falls = math.log(then / rules.allowed(progress, spacing))  # the path itself until then
        z, trend = track.smoothed, track.trend
        if rules.late(progress, left):  # what nears the wrong side is believed at once, else when it goes on
            if side * now < 0:
                trend = side * max(side * trend, min(side * change, LEAP))
            z = side * max(side * now, side * z)
        ahead = side * (z + trend * looks - falls)
        if ahead < 0:  # nothing towards that side for what may be chance
            ahead = min(ahead + deviation / 2, 0.0)
        return _clipped(side * ahead, FARTHEST_BELOW, FARTHEST_ABOVE)

    def _move(self, ahead: float, left: float, response: float) -> None:
        """The amount from now on, within what a look may move it; it does not wind up against its stops."""
        rules, state = self.rules, self.state
        most = rules.closes(ahead, left) / max(response, 0.1)
        gain = min(rules.gain * rules.hurry(ahead, state.progress, left), most)
        wanted = gain * ahead
        rise = max(math.log(rules.rise), -state.level * 2 / left)  # the most in half the looks that are left
        step = _clipped(wanted, -math.log(rules.fall), rise)
        before, state.level = state.level, _clipped(state.level + step, LOWEST, 0.0)
        state.move = state.level - before
        point = round(state.level / STEP)
        if point != round(before / STEP):
            state.amount = rules.most * math.exp(point * STEP) if point * STEP > LOWEST else 0.0

    def _out_of_reach(self, name: str, reading: Reading, progress: float, left: float) -> bool:
        """Whether the bound is over what is allowed now, and at the end if it goes on as it does."""
        track = self.state.tracks.get(name)
        if track is None or not math.isfinite(reading.bound):
            return True
        most = max(self.rules.aim, 1.0)  # budgets
        over = reading.bound > most * self.rules.allowed(progress, (1 - progress) / left) + reading.noise
        return over and track.bound + min(track.trend, 0.0) * left > math.log(most)


def _clipped(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def resolvable(rows: int) -> bool:
    """Whether so many rows can bound a change by less than itself, when they differ as much as they change.

    The interval's half width is then t / sqrt(n) of the change (Student's t of n - 1 degrees), which falls
    below 1 at n = 7.
    """
    return rows >= 7
