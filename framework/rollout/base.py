"""The contract of rollouts: prompts in, sampled answers out, token ids at both ends.

A rollout engine holds its own copy of the policy and knows no trainer: `update` fills it, `generate`
samples from it. It is a function of (weights, prompts, sampling): the same answers come out whatever the
number of ranks, because every answer draws from its own keyed generator and batches are formed from the
whole list of prompts before ranks share them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

CRITIC = "critic."
"""What a critic's weights are named with where they stand among the policy's: no rollout takes them."""


@dataclass(frozen=True)
class Prompt:
    """What is to be answered."""

    ids: tuple[int, ...]  # token ids, the generation prompt of the chat template included
    index: int  # place in the stream of prompts: unique within a run, part of every answer's random key
    row: Mapping[str, Any] = field(default_factory=dict)  # the data's row, which rewards read


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Log-probabilities are always those of this law."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the most likely token; log-probabilities are then those at 1
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    samples: int = 1  # answers to each prompt
    seed: int = 0  # answers are keyed by (seed, Prompt.index, sample)


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    text: str  # special tokens removed
    ids: tuple[int, ...]  # the end-of-turn token included when there is one
    finished: bool  # ended by itself; False: stopped at `max_new_tokens`
    logps: tuple[float, ...] = ()  # nats, of each of `ids` under the sampling law
    version: int = 0  # of the weights that drew it


class Rollout(Protocol):
    """A copy of the policy that answers."""

    def update(self, weights: Iterator[tuple[str, Tensor]], *, version: int) -> None:
        """Take the trainer's weights (`Engine.weights`) and forget every cache. Collective.

        Adapters arrive beside their frozen base and are merged into a temporary, never in place.
        """

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """`samples` answers to each prompt, in order. Collective: every rank hands over all prompts of
        the world and gets all answers."""

    def close(self) -> None: ...
