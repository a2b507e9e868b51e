"""Rows that judge answers: pairs, rankings and single answers that were liked or not.

Pure functions of one row, like `data.records`: every answer becomes a whole record, prompt and answer, in
which the answer alone is trained. Letters: K answers to one prompt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from framework.data.fields import Row, RowError, an_object, kind_of, list_of, not_blank, present, text_of
from framework.data.records import Message, Record, conversation, messages_of, untrained


class Pair(NamedTuple):
    """Of two answers, which is better and by how much."""

    better: int  # index into `Judged.answers`
    worse: int
    margin: float = 0.0  # 0 or more; 0 where the data says nothing


@dataclass(frozen=True)
class Judged:
    """One prompt, its K answers and what is known of them.

    A comparison has pairs; a single answer has none and is `desirable` or not.
    """

    answers: tuple[Record, ...]
    pairs: tuple[Pair, ...] = ()
    desirable: bool = True


def parse_comparison(row: Any, format: str, *, margin_from_scores: bool = False) -> Judged:
    """The answers of one row and its pairs; `format` is a key of COMPARISONS.

    `margin_from_scores` makes the difference of two answers' scores their margin where the row gives none of
    its own. Raises RowError.
    """
    return COMPARISONS[format](an_object(row), margin_from_scores)


def parse_labelled(row: Any, format: str) -> Judged:
    """{prompt, completion, label}: one answer and whether it was liked. Raises RowError."""
    assert format == "unpaired"
    prompt, completion = present(an_object(row), "prompt"), present(row, "completion")
    label = present(row, "label")
    if not isinstance(label, bool):
        raise RowError("wrong type", f"label is {kind_of(label)}; expected true or false")
    return Judged((_answered(prompt, completion, "completion", row),), desirable=label)


def _from_preference(row: Row, margin_from_scores: bool) -> Judged:
    chosen, rejected = present(row, "chosen"), present(row, "rejected")
    if type(chosen) is not type(rejected):
        raise RowError(
            "wrong type",
            f"chosen is {kind_of(chosen)} and rejected is {kind_of(rejected)}; expected two strings or two "
            "lists of messages",
        )
    prompt = row.get("prompt")
    if isinstance(chosen, list) and _is_whole(chosen, prompt):
        answers = _whole_conversations(chosen, rejected, row)
    elif prompt is None and isinstance(chosen, str):
        answers = [Record(text=not_blank(text_of(row[name], name), name)) for name in ("chosen", "rejected")]
    else:
        prompt = present(row, "prompt")
        answers = [_answered(prompt, row[name], name, row) for name in ("chosen", "rejected")]
    _different(answers[0], answers[1], "chosen and rejected")
    return Judged(tuple(answers), (Pair(0, 1, _margin(row, margin_from_scores)),))


def _is_whole(chosen: Sequence[Any], prompt: Any) -> bool:
    """Whether a list of messages holds its prompt, too. Some data repeats the prompt in its own field."""
    if prompt is None:
        return True
    first = chosen[0].get("role") if chosen and isinstance(chosen[0], Mapping) else None
    if first not in ("system", "developer", "user"):
        return False
    return isinstance(prompt, str) or list(chosen[: len(prompt)]) == prompt


def _whole_conversations(chosen: Any, rejected: Any, row: Row) -> list[Record]:
    """The prompt is the turns that both begin with."""
    one, other = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
    if shared == len(one) == len(other):
        raise RowError("same answers", "chosen and rejected are the same")
    if shared == 0:
        raise RowError(
            "no shared prompt",
            "chosen and rejected begin with different turns; expected two conversations that share their "
            "prompt, or a field prompt",
        )
    if shared == min(len(one), len(other)):
        shorter = "chosen" if shared == len(one) else "rejected"
        raise RowError("empty", f"{shorter} has no turn after those that both share")
    return [conversation([*untrained(turns[:shared]), *turns[shared:]], row) for turns in (one, other)]


def _from_ranking(row: Row, margin_from_scores: bool) -> Judged:
    prompt, responses = present(row, "prompt"), list_of(row, "responses")
    if len(responses) < 2:
        raise RowError("no pair", f"{len(responses)} responses; expected two or more to compare")
    answers = [_answered(prompt, each, f"responses[{i}]", row) for i, each in enumerate(responses)]
    scores = None
    if row.get("ranks") is not None:
        goodness = [-rank for rank in _numbers(row, "ranks", len(answers))]  # rank 1 is the best
    elif row.get("scores") is not None:
        goodness = scores = _numbers(row, "scores", len(answers))
    else:
        goodness = [-float(i) for i in range(len(answers))]
    if margin_from_scores and scores is None:
        raise RowError("missing field", "no field scores to take margins from")
    pairs = []
    for i, j in itertools.permutations(range(len(answers)), 2):
        if goodness[i] > goodness[j]:
            _different(answers[i], answers[j], f"responses[{i}] and responses[{j}]")
            margin = scores[i] - scores[j] if margin_from_scores and scores is not None else 0.0
            pairs.append(Pair(i, j, margin))
    if not pairs:
        raise RowError("no pair", f"all {len(answers)} responses tie; expected one that is better")
    return Judged(tuple(answers), tuple(pairs))


COMPARISONS: dict[str, Callable[[Row, bool], Judged]] = {
    "preference": _from_preference,
    "ranking": _from_ranking,
}
LABELLED = ("unpaired",)


def _answered(prompt: Any, answer: Any, name: str, row: Row) -> Record:
    """Two strings are plain text; messages on either side make a chat, in which a string is one turn."""
    if isinstance(prompt, str) and isinstance(answer, str):
        not_blank(text_of(prompt, "prompt"), "prompt")
        return Record(text=prompt + not_blank(text_of(answer, name), name), trained_from=len(prompt))
    turns = []
    for value, field, role in ((prompt, "prompt", "user"), (answer, name, "assistant")):
        if isinstance(value, str):
            turns.append([Message(role, text_of(value, field), role == "assistant")])
        elif isinstance(value, list):
            turns.append(messages_of(value, field))
        else:
            raise RowError(
                "wrong type", f"{field} is {kind_of(value)}; expected a string or a list of messages"
            )
    return conversation([*untrained(turns[0]), *turns[1]], row)


def _different(one: Record, other: Record, names: str) -> None:
    if one == other:
        raise RowError("same answers", f"{names} are the same, so neither is better")


def _margin(row: Row, from_scores: bool) -> float:
    if row.get("margin") is not None:
        margin, name = _number(row["margin"], "margin"), "margin"
    elif from_scores:
        scores = [_number(present(row, key), key) for key in ("score_chosen", "score_rejected")]
        margin, name = scores[0] - scores[1], "score_chosen - score_rejected"
    else:
        return 0.0
    if margin < 0:
        raise RowError("negative margin", f"{name} is {margin:g}, so chosen is worse; expected 0 or more")
    return margin


def _numbers(row: Row, key: str, count: int) -> list[float]:
    values = list_of(row, key)
    if len(values) != count:
        raise RowError("wrong length", f"{len(values)} {key} for {count} responses; expected one for each")
    return [_number(value, f"{key}[{i}]") for i, value in enumerate(values)]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("wrong type", f"{name} is {kind_of(value)}; expected a number")
    if not math.isfinite(value):
        raise RowError("wrong type", f"{name} is {value}; expected a finite number")
    return float(value)
