"""Which format rows are in, by their fields alone, and what to say when it is none that is wanted.

Knows the names of fields, not what stands in them: parsing is `data.records` and `data.preferences`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from framework.data.fields import Row, RowError

FIELDS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "ranking": ("prompt", "responses"),
    "unpaired": ("prompt", "completion", "label"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "prompt": ("prompt",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Format -> the fields it needs. Of several that fit a row, the first that is wanted rules: it says most."""

VAGUE = {"prompt", "text"}  # one field that rows of many kinds have
USED_BY = {
    "preference": "stage=preference or stage=reward",
    "ranking": "stage=preference or stage=reward",
    "unpaired": "stage=preference with loss=kto",
    "prompt": "stage=ppo or stage=grpo",
}
SUPERVISED = "stage=sft"

OTHER_WORDS = {
    "chosen": ("accepted", "preferred", "better", "winner", "good"),
    "rejected": ("dispreferred", "worse", "loser", "bad"),
    "prompt": ("question", "query", "input", "problem"),
    "completion": ("answer", "response", "output", "solution"),
    "responses": ("answers", "candidates", "completions"),
    "label": ("liked", "desirable", "thumbs_up", "feedback"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "instruction": (),
    "output": ("response", "answer"),
    "conversations": ("conversation", "dialogue"),
    "text": ("content", "document"),
}
"""Field -> what authors call it elsewhere, for hints."""


def detect(rows: Sequence[Any], among: Collection[str]) -> str | None:
    """The format of `among` that the first rows agree on by their fields; None when no row has them.

    Raises RowError when two rows speak for different formats.
    """
    found: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping) and (name := _format_of(row, among)) is not None:
            found.setdefault(name, number)
    if len(found) > 1:
        listed = " and ".join(f"{name} (row {number})" for name, number in found.items())
        raise RowError("mixed formats", f"the first rows look like {listed}")
    return next(iter(found), None)


def _format_of(row: Row, among: Collection[str]) -> str | None:
    if "conversations" in row and "messages" not in row and "messages" in among:
        turns = row["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, Mapping) and "role" in first:
            return "messages"
    fitting = (name for name, needed in FIELDS.items() if name in among and all(f in row for f in needed))
    return next(fitting, None)


def expected(among: Iterable[str]) -> str:
    """The fields of the formats that are wanted: `messages, prompt and completion, or text`."""
    options = [" and ".join(FIELDS[name]) for name in among]
    return options[0] if len(options) == 1 else ", ".join(options[:-1]) + f", or {options[-1]}"


def hint(rows: Sequence[Any], among: Collection[str]) -> str:
    """What the rows may be instead, as the end of a sentence; empty when nothing comes near.

    Either a format of another stage, or the wanted format that most of the fields would give when renamed.
    """
    first = [row for row in rows if isinstance(row, Mapping)][:1]
    other = detect(first, FIELDS.keys() - VAGUE)
    if other is not None:
        return _of_another(other)
    fields = sorted({str(key) for row in rows if isinstance(row, Mapping) for key in row})
    best: tuple[float, str, dict[str, str]] = (0.0, "", {})
    for name in among:
        renamed = {needed: _nearest(needed, fields) for needed in FIELDS[name] if needed not in fields}
        if all(renamed.values()):
            share = 1 - len(renamed) / (len(FIELDS[name]) + 1)
            best = max(best, (share, name, {k: v for k, v in renamed.items() if v}), key=lambda b: b[0])
    _, name, renames = best
    if not renames:
        other = detect(first, VAGUE)
        return "" if other is None else _of_another(other)
    return f". Nearest is {name}: call " + " and ".join(f"{old} {new}" for new, old in renames.items())


def _of_another(format: str) -> str:
    return f". These rows are of the format {format}, for {USED_BY.get(format, SUPERVISED)}"


def _nearest(needed: str, fields: Sequence[str]) -> str | None:
    """The field that may be meant."""
    for field in fields:
        plain = field.lower()
        if plain in OTHER_WORDS[needed] or needed in plain.split("_"):
            return field
    return next(iter(difflib.get_close_matches(needed, fields, n=1, cutoff=0.75)), None)
