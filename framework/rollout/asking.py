"""A model that writes by itself: requests out of nothing, and answers to drafts of rows.

What comes out is a function of the model, the sampling and each draft's number: the same on any number of
ranks. Knows no data and no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from framework.keyed import key
from framework.rollout.base import Completion, Prompt, Rollout, Sampling
from framework.rollout.sifting import Rules, cut

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Draft:
    """A row that lacks its answer."""

    index: int  # in its stream: what chance does to the answer is keyed by it
    ids: Ids  # what the model goes on from
    row: Mapping[str, Any]  # what is there of the row
    gold: str | None = None  # an answer to fall back on


@dataclass(frozen=True)
class Turn:
    """What stands around a user's turn in a chat template."""

    opening: Ids  # up to where the user speaks
    closing: str  # how the turn ends, as text; empty where generation stops by itself


@dataclass
class Drafts:
    """What a model is to answer, and what of it fell away."""

    drafts: list[Draft]
    dropped: Counter[str] = field(default_factory=Counter)


class Writer:
    """Asks `rollout` and sifts what it says by `rules`."""

    def __init__(self, rollout: Rollout, tokenizer: Any, sampling: Sampling, rules: Rules) -> None:
        self.rollout, self.tokenizer, self.sampling, self.rules = rollout, tokenizer, sampling, rules

    def requests(
        self, turn: Turn, indices: Sequence[int], draft: Callable[[int, str], Draft | None]
    ) -> Drafts:
        """The user's turns that the model writes behind `turn.opening`, as drafts. Collective.

        `draft` makes one of an index and a request, None where that is over-long.
        """
        found = Drafts([])
        said = self._said([Prompt(turn.opening, index) for index in indices], "request")
        for index, whole in zip(indices, said, strict=True):
            completion = cut(whole, self.tokenizer, turn.closing)
            request = completion.text.strip()
            # a request may be a word
            if fault := replace(self.rules, least=1).fault(completion, request):
                found.dropped[f"request {fault}"] += 1
            elif (made := draft(index, request)) is None:
                found.dropped["request over-long"] += 1
            else:
                found.drafts.append(made)
        return found

    def answers(self, drafts: Sequence[Draft]) -> list[tuple[Completion, str | None]]:
        """What the model says to each draft, and why that is of no use. Collective."""
        said = self._said([Prompt(draft.ids, draft.index) for draft in drafts], "answer")
        return [(completion, self.rules.fault(completion, completion.text.strip())) for completion in said]

    def _said(self, prompts: Sequence[Prompt], what: str) -> list[Completion]:
        if not prompts:
            return []
        sampling = replace(self.sampling, seed=key(self.sampling.seed, "self", what))
        return [answer for (answer,) in self.rollout.generate(prompts, sampling)]
