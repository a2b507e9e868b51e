"""Rewards over several ranks: plain functions that share the work out, and a reward model.

A reward model reads prompt and answer and says one number at the last token. Letters: N answers, S segments
of a micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from framework.batch import Batch, Scores
from framework.rollout.base import Completion, Prompt
from framework.rollout.experience import Experience, Packing, cut
from framework.stages.asking import Reward
from framework.stages.sharing import everywhere
from framework.strategy.base import World


@dataclass(frozen=True)
class Scored:
    """What a reward says of N answers."""

    scores: Tensor  # [N] fp64
    metrics: Mapping[str, float] = field(default_factory=dict)


class Dealt:
    """A reward that knows no ranks, asked for its share of the answers on each of them.

    Every rank gets all scores, those that were computed: a judge that takes time or chance into account
    cannot make ranks disagree. A metric is the mean over answers.
    """

    def __init__(self, reward: Reward, *, world: World) -> None:
        self.reward, self.world = reward, world

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scored:
        """[N] scores, alike on all ranks. Collective."""
        rank, size = self.world.rank, self.world.size
        mine = prompts[rank::size], completions[rank::size]
        said = self.reward(*mine) if mine[0] else Scored(torch.empty(0))
        ranks = self.world.gather({"scores": said.scores.tolist(), "metrics": dict(said.metrics)})
        scores = torch.empty(len(completions), dtype=torch.float64)
        sums: dict[str, list[float]] = {}
        for r, answer in enumerate(ranks):
            count = len(answer["scores"])
            scores[r::size] = torch.tensor(answer["scores"], dtype=torch.float64)
            for name, value in answer["metrics"].items():
                entry = sums.setdefault(name, [0.0, 0.0])
                entry[0] += count * value
                entry[1] += count
        return Scored(scores, {name: total / count for name, (total, count) in sums.items()})


class ModelReward:
    """Scores answers with `model`, a frozen scorer spread like the policy. It must read the same tokens."""

    def __init__(self, model: Callable[[Batch], Scores], *, packing: Packing, world: World) -> None:
        self.model, self.world, self.packing = model, world, packing

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scored:
        """[N] scores, alike on all ranks. Collective."""
        asked, given = _groups(prompts, completions)
        answers = Experience.of(asked, given, torch.zeros(len(completions)))
        owners = answers.owners
        mine = torch.zeros(len(completions), dtype=torch.float64)
        for batch, tokens in cut(answers, range(len(completions)), self.packing):
            scores = self.model(at_the_end(batch)).scores.double().cpu()
            if tokens.numel():
                sequences = torch.empty(len(scores), dtype=torch.int64)
                sequences[batch.segments] = owners[tokens]
                mine[sequences] = scores
        return Scored(everywhere(self.world, mine))


def _groups(
    prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> tuple[list[Prompt], list[list[Completion]]]:
    """Each prompt once with its answers, where those follow one another: they can share its tokens."""
    runs = itertools.groupby(zip(prompts, completions, strict=True), key=lambda pair: tuple(pair[0].ids))
    groups = [list(run) for _, run in runs]
    return [group[0][0] for group in groups], [[answer for _, answer in group] for group in groups]


def at_the_end(batch: Batch) -> Batch:
    """The same tokens, asked at the last one of each segment: K = S, and `targets` mean nothing."""
    count = batch.boundaries.numel() - 1
    if batch.packed:
        last = batch.boundaries[1:].long() - 1
        last = last if batch.places is None else batch.places[last]
    else:
        last = torch.arange(count) * batch.input_ids.shape[1] + batch.boundaries.diff().long() - 1
    return replace(
        batch,
        trained=last,
        targets=torch.zeros_like(last),
        weights=torch.zeros(count),
        segments=torch.arange(count),
        units=0.0,
    )
