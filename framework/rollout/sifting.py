"""What of a model's own text is of use, by its form alone: nothing here knows a language or what is true.

A fault has a name, so that what was left out can be counted by reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from framework.rollout.assess import distinct
from framework.rollout.base import Completion

LOOPING = 0.5  # least share of different runs of tokens; prose has over 0.9, tables and code over 0.7
LONG = 16  # tokens; in less, repetition means nothing
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of bytes that are no text

UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Rules:
    """What text must not contain, and how long it is at least."""

    special: frozenset[int]  # token ids that are no text
    marks: tuple[str, ...]  # of the chat template, as text
    least: int  # tokens, the end not counted

    @classmethod
    def of(cls, tokenizer: Any, marks: tuple[str, ...], least: int) -> Rules:
        """For text of one tokenizer: none of its special tokens, spelled out or not."""
        added = tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        spelled = {str(token) for token in added.values() if token.special} | set(
            tokenizer.all_special_tokens
        )
        return cls(frozenset(special), tuple(sorted({*spelled, *marks} - {""})), least)

    def fault(self, completion: Completion, text: str) -> str | None:
        """Why `text`, which is said in `completion`, is of no use; None where it is."""
        ids = completion.ids[:-1] if completion.finished else completion.ids
        if not completion.finished:
            return UNFINISHED
        if not any(letter.isalnum() for letter in text):
            return "empty"
        if len(ids) < self.least:
            return "too short"
        if self.special.intersection(ids) or any(mark in text for mark in self.marks):
            return "special tokens"
        if BROKEN in text:
            return "broken characters"
        if len(ids) >= LONG and (distinct(ids) or 0.0) < LOOPING:
            return "repetitive"
        return None


def cut(completion: Completion, tokenizer: Any, closing: str) -> Completion:
    """`completion` up to where `closing` stands in it, ended there; as it is where that does not come.

    For turns that end with a mark at which generation does not stop by itself.
    """
    if not closing:
        return completion
    spelled = tokenizer.decode(list(completion.ids), skip_special_tokens=False)
    text, found, _ = spelled.partition(closing)
    if not found:
        return completion
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = completion.ids[-1]  # whatever it was: as an end it is not looked at
    return Completion(text, (*ids, end), finished=True, version=completion.version)
