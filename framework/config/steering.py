"""A budget of forgetting: from what a look has found to how much is replayed next, and the words for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from framework.config.replay import Replay
from framework.rollout import intervals
from framework.strategy.base import World
from framework.train.budget import Controller, Decision, Reading, Rules, Verdict, landing, resolvable
from framework.train.retain import Found, relative
from framework.train.trainer import Report

LEAST_RATE = 0.1  # of the highest: what is forgotten hardly depends on smaller ones
NOTHING = Reading(change=0.0, high=math.inf, noise=0.0, rows=0)


class Steering:
    """Acts on each look of `train.retain.Retention`: moves replay, says so, and judges at the end.

    `names` are the kinds of text that a budget binds, one for all or each its own; the controller is told
    parts of it. `steer` sets the amount of replay; None where nothing is replayed, and the budget is judged
    only. `rate` is the learning rate of each step; None where it does not change. A run of `landing_in`
    looks, where that is not 0, goes back towards its start at its end until the budget is kept
    (`train.interpolate`): it may end beyond, and is steered to, since a way back can use a budget up and a
    way on cannot. Decided on rank 0 and broadcast, state and all, so that no rank can differ.
    """

    def __init__(
        self,
        asked: Replay,
        names: Sequence[str],
        steer: Callable[[float], None] | None,
        world: World,
        *,
        steps: int,
        rate: Callable[[int], float] | None = None,
        landing_in: int = 0,
    ) -> None:
        assert asked.max_forgetting is not None
        self.asked, self.names, self.steer, self.world, self.steps = asked, names, steer, world, steps
        self.landing = landing_in > 0
        given = asked.max_forgetting
        budgets = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
        self.budgets = {name: self._inside(budgets[name]) for name in names}
        start, most = (1.0, 1.0) if steer is None else (asked.start, asked.most or asked.start)
        falls = _falls(rate, steps) if rate is not None else _stays
        rules = landing(landing_in) if landing_in else Rules
        self.controller = Controller(rules(budget=1.0, start=start, most=most, rate=falls))
        self.spent = 0.0  # amount times steps
        self.since = 0  # the step of the last look
        self.judged: dict[str, Any] = {}

    def __call__(self, step: int, found: Found) -> tuple[dict[str, float], list[Report]]:
        """(metrics, lines) of a look after `step` steps. Collective."""
        readings = self._readings(found)
        self.spent += self.controller.state.amount * (step - self.since)
        self.since = step
        metrics = {"replay/share" if self._mixed else "replay/coefficient": self.controller.state.amount}
        if self.steer is None:
            metrics = {}
        if step == 0:  # nothing was trained, so nothing can be forgotten yet
            return metrics, self._doubts(readings, found)
        if step == self.steps:
            return metrics, [self._judge(found, last=not self.landing)]
        if self.steer is None or not readings:  # no question was asked
            return metrics, []
        mine = None
        if self.world.rank == 0:
            decided = self.controller.decide(self._parts(readings), progress=step / self.steps)
            mine = {"state": self.controller.state_dict(), "decision": vars(decided)}
        told = self.world.broadcast(mine)
        self.controller.load(told["state"])
        decision = Decision(**told["decision"])
        lines: list[Report] = []
        if decision.moved:
            self.steer(decision.amount)
            lines.append(("event", {"message": self._moved(decision, readings)}))
        if decision.infeasible:
            how = " by replay alone, and the end will go back" if self.landing else ""
            message = (
                f"the forgetting budget cannot be met{how}: {self._worst(decision.binding, readings)}, "
                f"though {self._word()} is {self._amount(decision.amount)}, its most. {self._advice()}"
            )
            lines.append(("event", {"message": message}))
        return metrics, lines

    def keeps(self, found: Found) -> bool:
        """Whether what was measured is within the budget. Alike on all ranks, as the measurements are."""
        return self.controller.verdict(self._parts(self._readings(found))).status == "kept"

    def judge(self, found: Found, *, share: float) -> Report:
        """The verdict on what is handed out in the place of the last weights, at `share` of the way."""
        before = self.judged.get("message", "nothing was said")
        readings = self._readings(found)
        kind, judged = self._judge(found)
        if share < 1 and judged["verdict"] == "kept":
            self.judged["verdict"] = "kept by interpolation"
            self.judged["message"] = (
                f"{self._budget} kept by interpolating with the start weights by "
                f"{share:.4g}: {self._worst(judged['binding'], readings)}. Without: {before}"
            )
        self.judged["interpolated"] = share
        return kind, self.judged

    def _readings(self, found: Found) -> dict[str, Reading]:
        """Of the bound kinds of text, in the unit of the budget; none where questions were not asked."""
        unit = self.asked.unit
        if unit == "accuracy" and not found.falls:
            return {}
        readings = dict.fromkeys(self.names, NOTHING)  # of rows that the start model cannot score
        if unit == "accuracy":
            known = {
                name: Reading(one.change, one.high, one.noise, one.questions)
                for name, one in found.falls.items()
            }
        elif unit == "kl":
            known = {n: Reading(one.change, one.high, 0.0, one.rows) for n, one in found.divergences.items()}
        else:
            known = {
                name: Reading(one.change, one.high, found.noise[name], one.rows)
                for name, one in found.changes.items()
            }
        return readings | {name: known[name] for name in known.keys() & readings.keys()}

    def _parts(self, readings: Mapping[str, Reading]) -> dict[str, Reading]:
        return {name: reading.over(self.budgets[name]) for name, reading in readings.items()}

    def state_dict(self) -> dict[str, Any]:
        """To go on from exactly; JSON."""
        kept = {"spent": self.spent, "since": self.since, "judged": self.judged}
        return {**kept, "controller": self.controller.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. The amount itself is the stage's to remember."""
        self.spent, self.since, self.judged = state["spent"], state["since"], dict(state["judged"])
        self.controller.load(state["controller"])

    @property
    def _mixed(self) -> bool:
        return self.asked.scale is None

    def _word(self) -> str:
        return "the replay share" if self._mixed else "the coefficient of replay"

    def _amount(self, amount: float) -> str:
        return f"{amount:.2%}" if self._mixed else f"{amount:.4g}"

    def _worst(self, name: str | None, readings: Mapping[str, Reading]) -> str:
        if name is None or readings[name].high <= 0:
            return "nothing is forgotten"
        return f"{name} has forgotten up to {self._shown(readings[name].high)}"

    def _inside(self, budget: float) -> float:
        """A budget as given, in the unit of readings."""
        return math.log1p(budget) if self.asked.unit == "relative_loss" else budget

    def _outside(self, value: float) -> float:
        """What was read, as it is given."""
        return relative(value) if self.asked.unit == "relative_loss" else value

    def _shown(self, value: float) -> str:
        """A change as people read it."""
        if self.asked.unit == "accuracy":
            return f"{100 * value:.2f} points of accuracy"
        return f"{relative(value):.2%}" if self.asked.unit == "relative_loss" else f"{value:.4g} nats of KL"

    @property
    def _budget(self) -> str:
        """What was asked for, in words."""
        if isinstance(self.asked.max_forgetting, Mapping):
            each = ", ".join(f"{self._shown(budget)} on {name}" for name, budget in self.budgets.items())
            return f"forgetting budget of {each}"
        return f"forgetting budget of {self._shown(next(iter(self.budgets.values())))}"

    def _moved(self, decision: Decision, readings: Mapping[str, Reading]) -> str:
        word = "up" if decision.amount > decision.before else "down"
        return (
            f"{self._word()} goes {word} from {self._amount(decision.before)} to "
            f"{self._amount(decision.amount)}: {self._worst(decision.binding, readings)}, the budget is "
            f"{self._shown(self.budgets[decision.binding or self.names[0]])}"
            + (", which the end of the run goes back to" if self.landing else "")
        )

    def _doubts(self, readings: Mapping[str, Reading], found: Found) -> list[Report]:
        """Budgets that the probe cannot resolve, before anything is trained."""
        lines: list[Report] = []
        for name, reading in readings.items():
            budget = self.budgets[name]
            if self.asked.unit != "accuracy" and not resolvable(reading.rows):
                why = f"{reading.rows} rows bound no change by less than itself; expected 7, best hundreds"
            elif reading.noise >= budget:
                why = f"the start model measured twice differs by {self._shown(reading.noise)} on it"
            elif self.asked.unit == "accuracy" and not found.falls[name].right > 0:
                why = "the start model answers none of its questions right, so it has none to forget"
            else:
                continue
            message = f"a budget of {self._shown(budget)} cannot be resolved on {name}: {why}"
            lines.append(("event", {"message": message}))
        return lines

    def _judge(self, found: Found, *, last: bool = True) -> Report:
        """By what was found now; not `last` where the way back is still to be walked."""
        readings = self._readings(found)
        verdict = self.controller.verdict(self._parts(readings))
        mean = self.spent / max(self.steps, 1)
        name = verdict.binding
        high = -math.inf if name is None else readings[name].high
        given = self.asked.max_forgetting
        self.judged = {
            "verdict": verdict.status,
            "binding": name,
            "forgotten": self._outside(high if math.isfinite(high) or name is None else math.inf),
            "budget": given.get(name or self.names[0]) if isinstance(given, Mapping) else given,
            "unit": self.asked.unit,
            "mean_replay": mean if self.steer is not None else 0.0,
            "last_replay": self.controller.state.amount if self.steer is not None else 0.0,
            "message": self._verdict(verdict, readings, mean, found, last=last),
        }
        if isinstance(given, Mapping):
            self.judged["budgets"] = dict(given)
        return "event", self.judged

    def _verdict(
        self, verdict: Verdict, readings: Mapping[str, Reading], mean: float, found: Found, *, last: bool
    ) -> str:
        budget, worst = self._budget, self._worst(verdict.binding, readings)
        used = f"with {self._word()} at {self._amount(mean)} on average"
        if verdict.status == "kept":
            return f"{budget} kept: {worst}" + (f", {used}" if self.steer is not None else "")
        assert verdict.binding is not None
        if verdict.status == "unresolvable":
            return f"{budget} not resolved: {self._needs(verdict.binding, readings, found)}"
        if not last:
            return f"{budget} not kept by the tuned weights, where the way back begins: {worst}"
        if self.steer is None:
            return f"{budget} infeasible: {worst}, and nothing was replayed. {self._advice()}"
        at = self.controller.state.amount
        if at < self.controller.rules.most:
            reach = f"the run ended with {self._word()} at {self._amount(at)}, on its way; begin with more"
        else:
            reach = f"though {self._word()} reached its most, {self._amount(at)}"
        return f"{budget} infeasible: {worst}, {reach}. {self._advice()}"

    def _needs(self, name: str, readings: Mapping[str, Reading], found: Found) -> str:
        """What of a kind of text is not known, and what would do."""
        reading = readings[name]
        half, room = reading.high - reading.change, self.budgets[name] - reading.change
        enough, what, where = 0, "rows", "evaluate.retention"
        if self.asked.unit == "accuracy":
            what, where = "questions", "retain.prompts"
            fall, count = found.falls[name], max(reading.rows, 1)
            if room > 0:  # where the same shares change sides
                sides = fall.right_to_wrong / count, fall.wrong_to_right / count
                enough = intervals.questions_needed(self.budgets[name], *sides)
        elif math.isfinite(half) and room > 0:
            enough = math.ceil(reading.rows * (half / room) ** 2)
        need = f"about {enough} {what} of that kind in {where} would do" if enough else f"more {what}"
        return (
            f"{name} has changed by {self._shown(reading.change)}, which its {reading.rows} {what} only "
            f"bound by {self._shown(reading.high)}; {need}"
        )

    def _advice(self) -> str:
        return (
            "What helps: data of that kind in replay.sources (the start model can write it), a lower "
            "optim.lr, a larger replay.max_forgetting or replay.most"
        )


def _falls(rate: Callable[[int], float], steps: int) -> Callable[[float], float]:
    """The learning rate when some part of the run is done, over that at its end."""
    least = LEAST_RATE * max(rate(steps * k // 20) for k in range(20))
    end = max(rate(steps - 1), least)
    return lambda progress: max(rate(min(round(progress * steps), steps - 1)), least) / end


def _stays(progress: float) -> float:
    return 1.0
