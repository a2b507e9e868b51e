"""The student's own answers in place of given ones: on-policy distillation, or a share of it.

Agarwal et al. 2023, arXiv 2306.13649, algorithm 1, with one change: there a draw decides for a whole step
whether its answers are the student's own, here for each example, so that every step has about the same of
both. What is drawn is keyed by the example's place in the stream: the same whatever the ranks, and after a
resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from framework.keyed import key
from framework.losses.guard import require
from framework.rollout.base import Prompt, Rollout, Sampling
from framework.strategy.base import Engine

Example = tuple[Any, Any]
"""(token ids [T], trained [T] bool) as numpy arrays."""


class Own:
    """Has the policy of the moment answer `share` of the examples, in (0, 1], once each.

    The prompt of an example is all before its last answer; one that has none, as plain text, stays as it is
    given, and so do examples of tables from `tables` on, which are rehearsed and not learnt. Of a new example
    only the new answer is trained, cut where the example would be longer than `max_length`.
    """

    def __init__(
        self,
        engine: Engine,
        rollout: Rollout,
        sampling: Sampling,
        *,
        share: float,
        tables: int,
        max_length: int,
        seed: int,
    ) -> None:
        require("share", share, above=0, most=1)
        self.engine, self.rollout, self.sampling = engine, rollout, replace(sampling, samples=1)
        self.share, self.tables, self.max_length, self.seed = share, tables, max_length, seed
        self.answered = 0  # examples of the last step

    def __call__(self, first: int, examples: Sequence[tuple[int, Example]]) -> Mapping[int, Example]:
        """The examples to take instead, by their place in the step. Collective."""
        prompts: dict[int, Prompt] = {}
        for at, (table, (ids, trained)) in enumerate(examples):
            length = answer_begins(trained)
            if table < self.tables and length > 1 and self._chosen(first + at):
                prompts[at] = Prompt(tuple(ids[:length].tolist()), first + at)
        self.answered = len(prompts)
        if not prompts:
            return {}
        self.rollout.update(self.engine.weights(), version=first)
        answers = self.rollout.generate(list(prompts.values()), self.sampling)
        return {
            at: _example(prompt.ids, answer.ids[: self.max_length - len(prompt.ids)])
            for (at, prompt), (answer,) in zip(prompts.items(), answers, strict=True)
        }

    def _chosen(self, index: int) -> bool:
        return key(self.seed, "own", index) < self.share * 2**63


def answer_begins(trained: Any) -> int:
    """Where the last stretch of trained tokens begins; T where nothing is trained."""
    learnt = np.flatnonzero(trained)
    if not len(learnt):
        return len(trained)
    breaks = np.flatnonzero(np.diff(learnt) > 1)
    return int(learnt[breaks[-1] + 1] if len(breaks) else learnt[0])


def _example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    ids = np.array([*prompt, *answer], dtype=np.int32)
    return ids, np.arange(len(ids)) >= len(prompt)
