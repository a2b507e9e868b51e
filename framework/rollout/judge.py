"""The weighted sum of several rewards, each judged in its own processes and logged apart.

An answer that one of them failed on has no score: it is NaN, counted by kind, and left out by what comes
after. Ranks share the answers out and know all scores in the end. N: answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from framework.errors import SapwoodError
from framework.rollout.base import Completion, Prompt
from framework.rollout.pool import KINDS, Limits, Pool, Question


@dataclass(frozen=True)
class Spec:
    """One reward: a function by its dotted path (see `pool.Pool`) and what its numbers are worth."""

    name: str  # in metrics
    target: str  # "package.module.function"
    keywords: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    only_exact: bool = False  # a score below 1 counts as 0: verifiers pay for parts
    only_finished: bool = False  # an answer that did not end by itself counts as 0


@dataclass(frozen=True)
class Judged:
    """What N answers are worth."""

    scores: Tensor  # [N] fp64, weighted sum; NaN where a reward failed
    parts: Mapping[str, Tensor]  # [N] fp64 by name, before weighting
    failures: Mapping[str, Counter[str]]  # answers by name and kind of failure
    metrics: Mapping[str, float]


class Judge:
    """Rewards on the ranks of `world`, `workers` processes for each of them on every rank.

    Started when first needed and kept. When more than `max_failed` (a share from 0 to 1) of one call's
    answers failed by one reward, the call raises SapwoodError with the first failure in words: a run that
    learns from what is left would not be the run that was asked for.
    """

    def __init__(
        self, rewards: Sequence[Spec], world: Any, *, workers: int, limits: Limits, max_failed: float
    ) -> None:
        self.rewards, self.world, self.max_failed = rewards, world, max_failed
        self.pools = [Pool(r.target, r.keywords, workers=workers, limits=limits) for r in rewards]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Judged:
        """The prompt of each answer and the answers, alike on all ranks. Collective."""
        questions = [
            Question(c.text, p.row, len(c.ids), c.finished) for p, c in zip(prompts, completions, strict=True)
        ]
        rank, size = self.world.rank, self.world.size
        heard: list[Any] = []
        for pool in self.pools:
            said = pool.judge(questions[rank::size])
            heard.append([said.values, dict(said.failures), said.first])
        by_rank = self.world.gather(heard)
        parts, failures = {}, {}
        for number, spec in enumerate(self.rewards):
            values = torch.full((len(questions),), torch.nan, dtype=torch.float64)
            failed: Counter[str] = Counter()
            for other, said in enumerate(by_rank):
                values[other::size] = torch.tensor(said[number][0], dtype=torch.float64)
                failed.update(said[number][1])
            first = next((said[number][2] for said in by_rank if said[number][2]), "")
            self._check(spec, len(questions), failed, first)
            parts[spec.name], failures[spec.name] = _counted(spec, values, completions), failed
        scores = torch.stack([spec.weight * parts[spec.name] for spec in self.rewards]).sum(0)
        return Judged(scores, parts, failures, _metrics(parts, failures))

    def close(self) -> None:
        """End all processes."""
        for pool in self.pools:
            pool.close()

    def _check(self, spec: Spec, count: int, failed: Counter[str], first: str) -> None:
        lost = sum(failed.values())
        if lost > self.max_failed * count:
            kinds = ", ".join(f"{kind} {number}" for kind, number in failed.most_common())
            raise SapwoodError(
                f"reward {spec.name} ({spec.target}) failed on {lost} of {count} answers ({kinds}), more "
                f"than reward.max_failed={self.max_failed} allows. Mend it, or raise reward.timeout_s, "
                f"reward.memory_bytes or reward.max_failed. The first failure:\n{first}"
            )


def _counted(spec: Spec, values: Tensor, completions: Sequence[Completion]) -> Tensor:
    """`values` after what `spec` does not let pass; NaN stays."""
    zero = torch.zeros_like(values)
    if spec.only_exact:
        values = values.where((values == 1.0) | values.isnan(), zero)
    if spec.only_finished:
        ended = torch.tensor([completion.finished for completion in completions])
        values = values.where(ended | values.isnan(), zero)
    return values


def _metrics(parts: Mapping[str, Tensor], failures: Mapping[str, Counter[str]]) -> dict[str, float]:
    """Always the same names: the mean of each reward over the answers it judged, failures by kind."""
    metrics = {f"reward/{name}": float(values.nanmean()) for name, values in parts.items()}
    together: Counter[str] = sum(failures.values(), Counter())
    return metrics | {f"reward_failures/{kind}": float(together[kind]) for kind in KINDS}
