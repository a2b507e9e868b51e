"""A budget of forgetting: from what a look has found to how much is replayed next, and the words for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from framework.config.replay import Replay
from framework.strategy.base import World
from framework.train.budget import Controller, Decision, Reading, Rules, Verdict, resolvable
from framework.train.retain import Change, relative
from framework.train.trainer import Report

LEAST_RATE = 0.1  # of the highest: what is forgotten hardly depends on smaller ones
NOTHING = Reading(change=0.0, high=math.inf, noise=0.0, rows=0)


class Steering:
    """Acts on each look of `train.retain.Retention`: moves replay, says so, and judges at the end.

    `names` are the kinds of text that the budget binds, `steer` sets the amount of replay; None where nothing
    is replayed, and the budget is judged only. `rate` is the learning rate of each step; None where it does
    not change. Decided on rank 0 and broadcast, state and all, so that no rank can differ.
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
    ) -> None:
        assert asked.max_forgetting is not None
        self.asked, self.names, self.steer, self.world, self.steps = asked, names, steer, world, steps
        budget = math.log1p(asked.max_forgetting) if asked.unit == "relative_loss" else asked.max_forgetting
        start, most = (1.0, 1.0) if steer is None else (asked.start, asked.most or asked.start)
        falls = _falls(rate, steps) if rate is not None else _stays
        self.controller = Controller(Rules(budget=budget, start=start, most=most, rate=falls))
        self.spent = 0.0  # amount times steps
        self.since = 0  # the step of the last look
        self.judged: dict[str, Any] = {}

    def __call__(
        self,
        step: int,
        changes: Mapping[str, Change],
        noise: Mapping[str, float],
        divergences: Mapping[str, Change],
    ) -> tuple[dict[str, float], list[Report]]:
        """(metrics, lines) of a look after `step` steps. Collective."""
        readings = self._readings(changes, noise, divergences)
        self.spent += self.controller.state.amount * (step - self.since)
        self.since = step
        metrics = {"replay/share" if self._mixed else "replay/coefficient": self.controller.state.amount}
        if self.steer is None:
            metrics = {}
        if step == 0:  # nothing was trained, so nothing can be forgotten yet
            return metrics, self._doubts(readings)
        if step == self.steps:
            return metrics, [self._judge(readings)]
        if self.steer is None:
            return metrics, []
        mine = None
        if self.world.rank == 0:
            decided = self.controller.decide(readings, progress=step / self.steps)
            mine = {"state": self.controller.state_dict(), "decision": vars(decided)}
        told = self.world.broadcast(mine)
        self.controller.load(told["state"])
        decision = Decision(**told["decision"])
        lines: list[Report] = []
        if decision.moved:
            self.steer(decision.amount)
            lines.append(("event", {"message": self._moved(decision, readings)}))
        if decision.infeasible:
            message = (
                f"the forgetting budget cannot be met: {self._worst(decision.binding, readings)}, though "
                f"{self._word()} is {self._amount(decision.amount)}, its most. {self._advice()}"
            )
            lines.append(("event", {"message": message}))
        return metrics, lines

    def keeps(
        self, changes: Mapping[str, Change], noise: Mapping[str, float], divergences: Mapping[str, Change]
    ) -> bool:
        """Whether what was measured is within the budget. Alike on all ranks, as the measurements are."""
        return self.controller.verdict(self._readings(changes, noise, divergences)).status == "kept"

    def judge(
        self,
        changes: Mapping[str, Change],
        noise: Mapping[str, float],
        divergences: Mapping[str, Change],
        *,
        share: float,
    ) -> Report:
        """The verdict on what is handed out in the place of the last weights, at `share` of the way."""
        before = self.judged.get("message", "nothing was said")
        readings = self._readings(changes, noise, divergences)
        kind, judged = self._judge(readings)
        if share < 1 and judged["verdict"] == "kept":
            self.judged["verdict"] = "kept by interpolation"
            self.judged["message"] = (
                f"forgetting budget of {self._asked} kept by interpolating with the start weights by "
                f"{share:.4g}: {self._worst(judged['binding'], readings)}. Without: {before}"
            )
        self.judged["interpolated"] = share
        return kind, self.judged

    def _readings(
        self, changes: Mapping[str, Change], noise: Mapping[str, float], divergences: Mapping[str, Change]
    ) -> dict[str, Reading]:
        """Of the bound kinds of text, in the unit of the budget."""
        by_kl = self.asked.unit == "kl"
        found = divergences if by_kl else changes
        readings = dict.fromkeys(self.names, NOTHING)  # of rows that the start model cannot score
        for name in found.keys() & readings.keys():
            one = found[name]
            readings[name] = Reading(one.change, one.high, 0.0 if by_kl else noise[name], one.rows)
        return readings

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

    def _shown(self, nats: float) -> str:
        """A change of loss as people read it, or a divergence."""
        return f"{relative(nats):.2%}" if self.asked.unit == "relative_loss" else f"{nats:.4g} nats of KL"

    @property
    def _asked(self) -> str:
        return self._shown(self.controller.rules.budget)

    def _moved(self, decision: Decision, readings: Mapping[str, Reading]) -> str:
        word = "up" if decision.amount > decision.before else "down"
        return (
            f"{self._word()} goes {word} from {self._amount(decision.before)} to "
            f"{self._amount(decision.amount)}: {self._worst(decision.binding, readings)}, the budget is "
            f"{self._asked}"
        )

    def _doubts(self, readings: Mapping[str, Reading]) -> list[Report]:
        """Budgets that the probe cannot resolve, before anything is trained."""
        lines: list[Report] = []
        for name, reading in readings.items():
            if not resolvable(reading.rows):
                why = f"{reading.rows} rows bound no change by less than itself; expected 7, best hundreds"
            elif reading.noise >= self.controller.rules.budget:
                why = f"the start model measured twice differs by {self._shown(reading.noise)} on it"
            else:
                continue
            message = f"a budget of {self._asked} cannot be resolved on {name}: {why}"
            lines.append(("event", {"message": message}))
        return lines

    def _judge(self, readings: Mapping[str, Reading]) -> Report:
        verdict = self.controller.verdict(readings)
        mean = self.spent / max(self.steps, 1)
        self.judged = {
            "verdict": verdict.status,
            "binding": verdict.binding,
            "forgotten": relative(verdict.high) if self.asked.unit == "relative_loss" else verdict.high,
            "budget": self.asked.max_forgetting,
            "unit": self.asked.unit,
            "mean_replay": mean if self.steer is not None else 0.0,
            "last_replay": self.controller.state.amount if self.steer is not None else 0.0,
            "message": self._verdict(verdict, readings, mean),
        }
        return "event", self.judged

    def _verdict(self, verdict: Verdict, readings: Mapping[str, Reading], mean: float) -> str:
        budget = f"forgetting budget of {self._asked}"
        worst = self._worst(verdict.binding, readings)
        used = f"with {self._word()} at {self._amount(mean)} on average"
        if verdict.status == "kept":
            return f"{budget} kept: {worst}" + (f", {used}" if self.steer is not None else "")
        assert verdict.binding is not None
        reading = readings[verdict.binding]
        if verdict.status == "unresolvable":
            half, room = reading.high - reading.change, self.controller.rules.budget - reading.change
            enough = math.ceil(reading.rows * (half / room) ** 2) if math.isfinite(half) and room > 0 else 0
            need = (
                f"about {enough} rows of that kind in evaluate.retention would do" if enough else "more rows"
            )
            return (
                f"{budget} not resolved: {verdict.binding} has changed by {self._shown(reading.change)}, "
                f"which its {reading.rows} rows only bound by {self._shown(reading.high)}; {need}"
            )
        if self.steer is None:
            return f"{budget} infeasible: {worst}, and nothing was replayed. {self._advice()}"
        at = self.controller.state.amount
        if at < self.controller.rules.most:
            reach = f"the run ended with {self._word()} at {self._amount(at)}, on its way; begin with more"
        else:
            reach = f"though {self._word()} reached its most, {self._amount(at)}"
        return f"{budget} infeasible: {worst}, {reach}. {self._advice()}"

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
