"""What every stage may have beside its own work: text to rehearse and text to watch.

Rehearsal is a second term with a denominator and a coefficient of its own (PPO-ptx, Ouyang et al. 2022,
section 3.5), so it means the same beside a preference loss, a policy gradient or a critic's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from framework.losses.items import Objective
from framework.stages.base import Stage, Term
from framework.stages.sft import Loader

REPORTED = ("sequences", "tokens", "trained_tokens")


@dataclass(frozen=True)
class Replay:
    """General data, imitated in every optimizer step."""

    loader: Loader
    objective: Objective
    scale: float  # coefficient of its token mean beside the stage's loss
    by_gradient: bool = False  # or what its gradient amounts to beside that of the stage's loss


class Rehearsal:
    """`stage` with a term of replay in each step and with general text among its held-out sets."""

    def __init__(self, stage: Stage, *, replay: Replay | None, retention: Mapping[str, Term]) -> None:
        self.stage, self.replay, self.retention = stage, replay, retention
        self.scale = 0.0 if replay is None else replay.scale

    def next(self, step: int) -> Sequence[Term]:
        """The stage's terms, then replay's, whose examples are counted as replay's own, also by source."""
        terms = list(self.stage.next(step))
        if self.replay is not None:
            taken = self.replay.loader.next()
            stats = {f"replay_{n}": v for n, v in taken.stats.items() if n.partition("/")[0] in REPORTED}
            share = self.scale if self.replay.by_gradient else None
            terms.append(
                Term(self.replay.objective, taken.micros, self.scale, share=share, name="replay", stats=stats)
            )
        return terms

    @property
    def resting(self) -> bool:
        """Whenever the stage is."""
        return self.stage.resting

    def reports(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """The stage's."""
        return self.stage.reports()

    def held_out(self) -> Mapping[str, Term]:
        """The stage's sets and the general ones."""
        return {**self.stage.held_out(), **self.retention}

    def steer(self, amount: float) -> None:
        """From the next step on rehearse by `amount`: a coefficient, or a share where replay is mixed in."""
        if self.replay is None:
            self.stage.steer(amount)  # type: ignore[attr-defined]
        else:
            self.scale = amount

    def state_dict(self) -> dict[str, Any]:
        """The stage's state, the position of replay, and its coefficient where it was changed."""
        if self.replay is None:
            return self.stage.state_dict()
        state = {"stage": self.stage.state_dict(), "replay": self.replay.loader.state_dict()}
        return state if self.scale == self.replay.scale else {**state, "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        if self.replay is None:
            self.stage.load_state_dict(state)
            return
        self.stage.load_state_dict(state["stage"])
        self.replay.loader.load_state_dict(state["replay"])
        self.scale = float(state.get("scale", self.replay.scale))
