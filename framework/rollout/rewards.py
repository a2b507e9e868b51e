"""Rewards: numbers for completions. Knows no model, no stage and no task library.

A verifier comes in as a plain function of (answer, row), so this room needs to know no task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework.rollout.base import Completion

Reward = Callable[[Sequence[Completion]], Tensor]
"""Completions in order -> [N] fp32."""

Score = Callable[[str, Mapping[str, Any]], float]
"""(answer, row) -> 0 to 1, the verdict of a task's own verifier."""


def verified(score: Score, rows: Sequence[Mapping[str, Any]]) -> Reward:
    """1 where the answer to the row at the same place is exactly right and ended by itself, else 0.

    Partial credit is not passed on: verifiers pay for containing the answer or for any permutation of
    it, and a policy learns to collect that. An answer that never ends is not an answer.
    """

    def reward(completions: Sequence[Completion]) -> Tensor:
        right = [c.finished and score(c.text, row) == 1.0 for c, row in zip(completions, rows, strict=True)]
        return torch.tensor(right, dtype=torch.float32)

    return reward
