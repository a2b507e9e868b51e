"""Reward modelling: a score per answer, a loss per pair of scores.

The engine holds a scorer; pairs need no reference and no coupling. Letters: N pairs, S = 2N segments, of
which 2n and 2n + 1 are the chosen and the rejected answer of pair n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework.batch import PairBatch
from framework.losses.inputs import inputs
from framework.losses.items import Items
from framework.stages.base import Term
from framework.stages.preference import PairLoader, wins
from framework.strategy.base import Engine, World

INPUTS = ("chosen", "rejected", "margin", "weight")
"""What a reward loss may ask for by parameter name."""


class RewardObjective:
    """A forward pass over chosen and rejected answers together, then a loss per pair of scores.

    `loss` asks by parameter name for `chosen` and `rejected` scores, `margin` and `weight`, each [N].
    Metrics besides the loss's own: `rewards/accuracy`, ties half, and `rewards/mean` over both answers.
    """

    def __init__(self, loss: Callable[..., Items]) -> None:
        self.loss = loss
        self.inputs = inputs(loss)

    def __call__(self, engine: Engine, batch: PairBatch) -> Items:
        batch = batch.to(engine.world.device)
        scores = engine(batch).scores  # [S]
        chosen, rejected = scores[0::2], scores[1::2]
        offered = {
            "chosen": chosen,
            "rejected": rejected,
            "margin": batch.margins,
            "weight": batch.pair_weights,
        }
        items = self.loss(**{name: offered[name] for name in self.inputs})
        chosen, rejected = chosen.detach(), rejected.detach()
        metrics = {"rewards/accuracy": wins(chosen - rejected), "rewards/mean": (chosen + rejected) / 2}
        return Items(items.loss, items.weight, {**items.metrics, **metrics})


class Reward:
    """A `Stage` over a loader of pairs, with held-out sets of fixed micro-batches.

    Its first report, of kind "baselines", says what held-out accuracy costs nothing: `<set>/longer`, the
    share of pairs whose chosen answer is the longer one, ties half.
    """

    def __init__(
        self,
        loader: PairLoader,
        objective: RewardObjective,
        held_out: Mapping[str, Sequence[PairBatch]],
        *,
        engine: Engine,
    ) -> None:
        self.loader, self.objective, self.engine = loader, objective, engine
        self._sets = held_out
        self._held_out = {name: Term(objective, micros) for name, micros in held_out.items()}
        self._fresh = True  # nothing was done or resumed yet

    def next(self, step: int) -> Sequence[Term]:
        """The one term of this step."""
        taken = self.loader.next()
        return [Term(self.objective, taken.micros, stats=taken.stats)]

    resting = True

    def reports(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """The trivial baselines, once a run. Collective."""
        fresh, self._fresh = self._fresh, False
        if not fresh or not self._held_out:
            return []
        world = self.engine.world
        return [
            (
                "baselines",
                {f"{name}/longer": longer(world, micros) for name, micros in self._sets.items()},
            )
        ]

    def held_out(self) -> Mapping[str, Term]:
        """The held-out sets, by name."""
        return self._held_out

    def moments(self) -> dict[str, tuple[float, float]]:
        """(mean, standard deviation) of the scores of every held-out set; see `score_moments`. Collective."""
        return {name: score_moments(self.engine, micros) for name, micros in self._sets.items()}

    def state_dict(self) -> dict[str, Any]:
        """The data position: one integer."""
        return dict(self.loader.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from that position."""
        self.loader.load_state_dict({"index": int(state["index"])})
        self._fresh = False


def longer(world: World, micros: Sequence[PairBatch]) -> float:
    """Accuracy of preferring the answer of more tokens over all ranks, ties half, by the pairs' weights.

    NaN where nothing counts. Collective.
    """
    right = weight = 0.0
    for batch in micros:
        lengths = batch.boundaries.diff()  # [S], the prompt counted in both answers alike
        right += float((wins((lengths[0::2] - lengths[1::2]).float()) * batch.pair_weights).sum())
        weight += float(batch.pair_weights.sum())
    right, weight = world.sum([right, weight])
    return right / weight if weight else math.nan


def score_moments(engine: Engine, micros: Sequence[PairBatch]) -> tuple[float, float]:
    """Mean and standard deviation of the scores of all answers over all ranks, without gradients.

    Answers of pairs that do not count are left out, the others count alike. Two sums of squares, so that
    a large mean does not cost the deviation its digits: the passes run once, the sums twice. (NaN, NaN)
    where nothing counts. Collective.
    """
    world = engine.world
    with engine.inference():
        scores = [_counted(engine(batch).scores, batch) for batch in micros]
    mine = torch.cat(scores) if scores else torch.zeros(0, dtype=torch.float64)
    total, count = world.sum([float(mine.sum()), float(mine.numel())])
    mean = total / count if count else math.nan
    (squares,) = world.sum([float((mine - mean).square().sum())])
    return mean, math.sqrt(squares / count) if count else math.nan


def _counted(scores: Tensor, batch: PairBatch) -> Tensor:
    """fp64 on the CPU."""
    return scores.double().cpu()[batch.pair_weights.repeat_interleave(2) > 0]
