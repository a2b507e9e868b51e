"""What keeps a run's model near its start besides replay: around the engine, and after the last step.

The weights that are handed out may be others than the last ones: their average, or a point on the way back to
the start. The checkpoint of the last step holds the last ones all the same, so a run that was killed in here
does it again, with the same result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from framework.config import stages, tabled
from framework.config.build import Prepared
from framework.config.steering import Steering
from framework.data.loader import Loader
from framework.data.mixture import Mixture
from framework.losses import sft as token_losses
from framework.models import adapters
from framework.models.actor_critic import CRITIC
from framework.stages.base import Stage
from framework.stages.sft import TokenObjective
from framework.strategy.base import Engine, World
from framework.track.base import Tracker
from framework.train.balance import Balance
from framework.train.evaluate import evaluate
from framework.train.fisher import fisher
from framework.train.interpolate import GRID, Line, largest
from framework.train.protect import Protected, Values, copied, put
from framework.train.retain import Retention
from framework.train.trainer import Assess, Result

FISHER_SEQUENCES = (
    8  # rows a square is taken of: few, since the mean of many gradients hides what single rows ask
)


def moves(name: str) -> bool:
    """Whether a parameter goes back to the start with the others.

    An adapter adds B A, and B starts at 0: with x B and A as it is tuned it adds exactly x of what it learnt.
    Critics are not handed out.
    """
    return not (adapters.is_inner(name) or name.startswith(CRITIC))


class Protection:
    """What `run.protect` asks for. Made while `engine` holds the start weights; train with `self.engine`.

    Collective. A run that is `resumed` finds its importances in the checkpoint.
    """

    def __init__(self, prepared: Prepared, world: World, engine: Engine, *, resumed: bool) -> None:
        self.prepared, self.engine, replay = prepared, engine, prepared.run.replay
        self.scale = Balance(engine, every=replay.measure_every) if replay.scale_by == "gradient" else None
        asked = prepared.run.protect
        self._start: Values = {}
        if asked.interpolate is not None:
            self._start = copied(engine, device=torch.device("cpu"))
        self._protected: Protected | None = None
        if asked.pull > 0 or asked.average is not None:
            self.engine = self._protected = Protected(
                engine,
                pull=asked.pull,
                importance=_importance(prepared, world, engine, resumed=resumed),
                average=asked.average,
                pulled=moves,
            )

    def finish(
        self, result: Result, stage: Stage, watch: Retention | None, assess: Assess | None, tracker: Tracker
    ) -> tuple[Result, dict[str, Any]]:
        """Put what is handed out into the engine: the result with its numbers, and more for result.json.

        Collective. Lines of the kind `interpolate` show what each point on the way costs and keeps, and the
        last ones of `eval` and `retain` are of what is handed out.
        """
        asked, step = self.prepared.run.protect, result.progress.step
        if asked.average is None and asked.interpolate is None:
            return result, {}
        if self._protected is not None and self._protected.average is not None:
            put(self.engine, self._protected.average)
        share = 1.0
        told: dict[str, Any] = {}
        if asked.interpolate is not None:
            share, told = self._interpolate(stage, watch, tracker, step)
        metrics = evaluate(self.engine, stage.held_out())
        if assess is not None:
            metrics |= assess(step)[0]
        if metrics:
            tracker.log("eval", metrics, step=step)
        if watch is not None:
            watch.measure()
            tracker.log("retain", watch.line(), step=step)
            if isinstance(watch.decide, Steering):
                kind, line = watch.decide.judge(watch.found, share=share)
                tracker.log(kind, line, step=step)
        return replace(result, metrics=metrics), told

    def _interpolate(
        self, stage: Stage, watch: Retention | None, tracker: Tracker, step: int
    ) -> tuple[float, dict[str, Any]]:
        """(x, what result.json says of the way), with the engine at x; 1 where no x keeps a budget."""
        asked = self.prepared.run.protect.interpolate
        line = Line(self.engine, self._start, moves)
        curve: dict[float, dict[str, float]] = {}

        def look(x: float) -> bool:
            line.go(x)
            found = evaluate(self.engine, stage.held_out())
            found = {n: v for n, v in found.items() if not n.endswith(("/units", "/perplexity"))}
            if watch is not None:
                watch.measure()
                found |= watch.line()
            curve[x] = found
            tracker.log("interpolate", {"x": x, **found}, step=step)
            if watch is None or not isinstance(watch.decide, Steering):
                return True
            return watch.decide.keeps(watch.found)

        if asked == "budget":
            best = largest(look)
            if best is None:
                message = (
                    "no point on the way back to the start weights keeps the forgetting budget: the tuned "
                    "weights are handed out"
                )
                tracker.log("event", {"message": message}, step=step)
        else:
            assert isinstance(asked, float)
            best = asked
            for x in (*GRID, best):
                look(x)
        share = 1.0 if best is None else best
        line.go(share)
        points = [{"x": x, **curve[x]} for x in sorted(curve)]
        return share, {"interpolation": {"x": best, "curve": points}}


def _importance(prepared: Prepared, world: World, engine: Engine, *, resumed: bool) -> Values | None:
    """The Fisher information of some rows; of a resumed run room for it, which the checkpoint fills."""
    asked, run = prepared.run.protect, prepared.run
    if asked.importance == "even":
        return None
    if resumed:
        return copied(engine)
    tables = prepared.important
    rows = Mixture(tabled.group(tables), None, fraction=0.0, seed=run.seed, shuffle=True)
    sequences = min(FISHER_SEQUENCES, run.batch.sequences)
    loader = Loader(tables, rows, sequences=sequences, **stages.cut_of(prepared, world)._asdict())
    steps = [loader.next().micros for _ in range(-(-asked.rows // sequences))]
    return fisher(engine, TokenObjective(token_losses.sft), steps)
