"""Questions that show what a run has forgotten: asked of the start model, and again of what became of it.

Answers are greedy, and a row is compared with itself: what counts is which answers changed sides. The start
model is asked twice, the second time in other batches, so that it is known by how much answers differ where
nothing was learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from framework.config import judging
from framework.config.build import Prepared
from framework.data import cache
from framework.rollout import intervals
from framework.rollout.assess import Assessment
from framework.rollout.base import CRITIC, Prompt, Rollout
from framework.strategy.base import Engine, World
from framework.train.retain import Cadence, Fall

Right = list[bool | None]
"""By question whether it was answered right; None where the answer could not be judged."""


@dataclass(frozen=True)
class Asked:
    """The questions of one source."""

    prompts: Sequence[Prompt]
    identity: str  # changes with the questions and with what decides who answers right


class Questions:
    """Asks `asked` of the weights in `engine`; see `train.retain.Questions`.

    `assess` answers prompts with what `rollout` holds and judges them. They are asked at the start, at every
    `every`-th look of `cadence` and at the end.
    """

    def __init__(
        self,
        engine: Engine,
        rollout: Rollout,
        assess: Callable[[Sequence[Prompt]], Assessment],
        asked: Mapping[str, Asked],
        *,
        cadence: Cadence,
        every: int,
    ) -> None:
        self._engine, self._rollout, self._assess = engine, rollout, assess
        self._asked, self._cadence, self._every = asked, cadence, every
        self._times = 0
        self._start: dict[str, dict[str, Any]] = {}  # by stratum: its identity, right answers and noise

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from `saved`; what it lacks is asked of the engine, which holds the start weights."""
        known = (saved or {}).get("start", {})
        self._start = {
            n: dict(known[n])
            for n, asked in self._asked.items()
            if n in known and known[n]["identity"] == asked.identity
        }
        missing = [name for name in self._asked if name not in self._start]
        if missing:
            self._update()
        for name in missing:
            asked = self._asked[name]
            right = self._answer(asked.prompts)
            again: Right = [None] * len(right)
            for part in (slice(0, None, 2), slice(1, None, 2)):
                again[part] = self._answer(asked.prompts[part])
            noise = abs(compared(right, again, noise=0.0).change)
            self._start[name] = {"identity": asked.identity, "right": right, "noise": noise}

    def due(self, step: int) -> bool:
        """Whether the look after `step` optimizer steps asks."""
        return step in (0, self._cadence.steps) or self._cadence.number(step) % self._every == 0

    def __call__(self, *, start: bool = False) -> dict[str, Fall]:
        """What the model as it is now has lost, by stratum; with `start` the start model against itself."""
        if not start:
            self._update()
        falls = {}
        for name, known in self._start.items():
            now = known["right"] if start else self._answer(self._asked[name].prompts)
            falls[name] = compared(known["right"], now, noise=known["noise"])
        return falls

    def state_dict(self) -> dict[str, Any]:
        """What the start model answered; JSON."""
        return {"start": self._start}

    def _update(self) -> None:
        self._rollout.update(self._engine.weights(without=CRITIC), version=self._times)
        self._times += 1

    def _answer(self, prompts: Sequence[Prompt]) -> Right:
        if not prompts:
            return []
        right = self._assess(prompts).right
        assert isinstance(right, Tensor)  # a verifier is always named
        return [None if value != value else value == 1.0 for value in right.tolist()]


def compared(start: Right, now: Right, *, noise: float) -> Fall:
    """The fall between two answers to each question; left out is what one of the times was not judged."""
    pairs = [(a, b) for a, b in zip(start, now, strict=True) if a is not None and b is not None]
    lost = sum(a and not b for a, b in pairs)
    gained = sum(b and not a for a, b in pairs)
    _, low, high = intervals.fall(lost, gained, len(pairs))
    right = sum(b for _, b in pairs) / len(pairs) if pairs else float("nan")
    return Fall(right, lost, gained, len(pairs), low, high, noise)


def build_questions(
    prepared: Prepared, world: World, engine: Engine, rollout: Rollout | None
) -> Questions | None:
    """What asks the questions of `retain.prompts`; None where there are none."""
    tables, probes, run = prepared.retain_questions, prepared.probes, prepared.run
    if not tables or probes is None:
        return None
    assert rollout is not None
    assess, judged_by = judging.build_ask(prepared, world, rollout)
    decisive = {"answers": judged_by, "precision": run.precision, "engine": run.rollout.engine}
    asked = {
        table.name: Asked(
            judging.asked(table, len(table), seed=run.seed),
            cache.fingerprint({"questions": table.fingerprint, **decisive}),
        )
        for table in tables
    }
    return Questions(engine, rollout, assess, asked, cadence=probes.cadence, every=run.retain.ask_every)
