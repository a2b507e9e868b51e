"""Prompts to judged answers: the part of an iteration that draws, and asks again where nothing can be learnt.

Letters: N answers, G answers to a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from framework.errors import SapwoodError
from framework.rollout.base import Completion, Prompt, Rollout, Sampling
from framework.rollout.experience import Experience, spread

Prompts = Callable[[int, int], Sequence[Prompt]]
"""(start, stop) -> the prompts at these places of an endless stream; always the same ones."""


class Judged(Protocol):
    """What a reward says of N answers."""

    @property
    def scores(self) -> Tensor:
        """[N] fp64, NaN where judging failed."""

    @property
    def metrics(self) -> Mapping[str, float]: ...


Reward = Callable[[Sequence[Prompt], Sequence[Completion]], Judged]
"""The prompt of each answer, the answers -> what they are worth, alike on all ranks. Collective."""


class Clock:
    """Seconds of each phase of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True)
class Asked:
    """Judged answers, and where the stream of prompts goes on."""

    experience: Experience
    stop: int
    metrics: Mapping[str, float]


class _Group(NamedTuple):
    prompt: Prompt
    answers: Sequence[Completion]
    rewards: Tensor  # [G] fp64


def ask(
    prompts: Prompts,
    rollout: Rollout,
    reward: Reward,
    sampling: Sampling,
    *,
    start: int,
    wanted: int,
    extra: int,
    clock: Clock,
) -> Asked:
    """Answers to `wanted` prompts from place `start` of the stream on.

    With `extra`, groups whose answers all scored alike are left out, and replaced from up to that many
    further prompts (dynamic sampling; Yu et al. 2025, arXiv 2503.14476, section 3.2). Where these do not
    suffice there are fewer; when not one group is left, the first ones stay: they teach nothing, but a run
    goes on.
    """
    kept: list[_Group] = []
    first: list[_Group] = []
    judged: list[tuple[int, Mapping[str, float]]] = []
    drawn = alike = 0
    while len(kept) < wanted and drawn < wanted + extra:
        count = min(wanted - len(kept), wanted + extra - drawn)
        some = list(prompts(start + drawn, start + drawn + count))
        drawn += count
        answers = rollout.generate(some, sampling)
        clock.lap("generate")
        groups, metrics = _judge(some, answers, reward)
        clock.lap("reward")
        judged.append((count, metrics))
        varied = [bool(spread(group.rewards, torch.zeros_like(group.rewards).long())) for group in groups]
        alike += varied.count(False)
        first = first or groups
        kept += [group for group, teaches in zip(groups, varied, strict=True) if teaches or not extra]
    kept = kept or first
    experience = Experience.of(
        [group.prompt for group in kept],
        [group.answers for group in kept],
        torch.cat([group.rewards for group in kept]),
    )
    names = {name for _, metrics in judged for name in metrics}
    means = {name: _mean([(n, m[name]) for n, m in judged if name in m]) for name in sorted(names)}
    means |= {"prompts_drawn": drawn, "groups_without_spread_share": alike / drawn}
    return Asked(experience, start + drawn, means)


def check_failures(experience: Experience, most: float) -> None:
    """Raises SapwoodError when the reward failed on more than the share `most` of the answers."""
    failed = experience.rewards.isnan().double().mean().item()
    if failed > most:
        raise SapwoodError(
            f"the reward failed on {failed:.0%} of an iteration's answers, more than stage.max_failed_share="
            f"{most}; what it said is in the lines before this one. Mend the reward, or raise the bound"
        )


def _judge(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], reward: Reward
) -> tuple[list[_Group], Mapping[str, float]]:
    """The groups with their rewards, and the reward's own metrics."""
    each = [prompt for prompt, group in zip(prompts, answers, strict=True) for _ in group]
    judged = reward(each, [completion for group in answers for completion in group])
    parts = judged.scores.double().cpu().split([len(group) for group in answers])
    return [_Group(*group) for group in zip(prompts, answers, parts, strict=True)], judged.metrics


def _mean(values: Sequence[tuple[int, float]]) -> float:
    """Weighted by the number of prompts."""
    return sum(n * value for n, value in values) / sum(n for n, _ in values)
