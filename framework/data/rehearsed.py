"""Rows of any stage as text to imitate, which is the form in which earlier stages are rehearsed.

A conversation or a text is rehearsed as it was learnt. Of answers that were compared it is the best one
(imitating what was chosen keeps what the comparison taught, and needs neither reference nor pair); of
answers that were judged singly those that were liked; of questions to a policy those whose row has an
answer. The others have nothing to imitate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from framework.data import buffer, sources
from framework.data.answers import AnswerTable
from framework.data.buffer import Line
from framework.data.chat import Encoded
from framework.data.fields import RowError
from framework.data.preferences import COMPARISONS, LABELLED, parse_comparison, parse_labelled
from framework.data.prompts import PromptTable
from framework.data.records import FORMATS, Message, Record, parse
from framework.data.sources import Located
from framework.data.tables import Table

Encode = Callable[[Sequence[Any], str], Sequence[Encoded | RowError]]
"""Rows of a format as a later stage will tokenise them."""


def record(value: Any, format: str) -> Record | None:
    """What of a row is imitated; None where there is nothing."""
    try:
        if format in COMPARISONS:
            judged = parse_comparison(value, format)
            worse = {pair.worse for pair in judged.pairs}
            return next(answer for i, answer in enumerate(judged.answers) if i not in worse)
        if format in LABELLED:
            liked = parse_labelled(value, format)
            return liked.answers[0] if liked.desirable else None
        return parse(value, format) if format in FORMATS else None
    except RowError:
        return None


def row_of(record: Record) -> dict[str, Any]:
    """The row that reads back as `record`: of the format prompt_completion, or text where no prompt is."""
    if record.text is not None:
        if record.trained_from == 0:
            return {"text": record.text}
        return {
            "prompt": record.text[: record.trained_from],
            "completion": record.text[record.trained_from :],
        }
    first = next(i for i, message in enumerate(record.messages) if message.train)
    row: dict[str, Any] = {
        "prompt": [dict(message.as_template_input()) for message in record.messages[:first]],
        "completion": [_turn(message) for message in record.messages[first:]],
    }
    return {**row, "tools": [dict(tool) for tool in record.tools]} if record.tools else row


def _turn(message: Message) -> dict[str, Any]:
    turn = message.as_template_input()
    return {**turn, "weight": 0} if message.role == "assistant" and not message.train else turn


def keep(
    table: Table,
    located: Located,
    rows: np.ndarray,
    encode: Encode,
    *,
    tokens: int,
    excluded: Collection[str],
) -> list[Line]:
    """Lines of `rows` of a table, in that order, that have `tokens` together.

    All of the kind of the first: a file has one format. What a later stage could not tokenise is left out.
    """
    chosen = rows[
        : int(np.searchsorted(np.cumsum(table.lengths[rows], dtype=np.int64), tokens, side="right"))
    ]
    found = _read(table, located, chosen)
    kinds = [_kind(line) for line in found.values()][:1]
    found = {row: line for row, line in found.items() if _kind(line) in kinds}
    counts = _tokens(table, found, encode)
    measured = [{**found[row], "tokens": count} for row, count in counts.items()]
    return buffer.draw(measured, tokens=tokens, excluded=excluded)


def named(table: Table, located: Located, rows: np.ndarray) -> dict[int, str]:
    """Row -> the name by which it can be excluded; of one with nothing to imitate, the hash of the row."""
    places = dict(zip(table.places(rows), rows.tolist(), strict=True))
    last = max(places, default=(-1, -1))
    found: dict[int, str] = {}
    for placed in located.rows():
        at = (placed.file, placed.line)
        if at in places:
            imitated = record(placed.value, table.format)
            found[places[at]] = buffer.row_hash(placed.value if imitated is None else row_of(imitated))
        if at >= last:
            break
    return found


def _read(table: Table, located: Located, rows: np.ndarray) -> dict[int, Line]:
    """Row -> line of those that have something to imitate, in the order of `rows`."""
    places = dict(zip(table.places(rows), rows.tolist(), strict=True))
    last = max(places, default=(-1, -1))
    found: dict[int, Line] = {}
    for placed in located.rows():
        at = (placed.file, placed.line)
        if at in places and (imitated := record(placed.value, table.format)) is not None:
            row = row_of(imitated)
            place = sources.place(located.files[placed.file], placed.line).rpartition("/")[2]
            found[places[at]] = {**row, "row": buffer.row_hash(row), "from": place}
        if at >= last:
            break
    return {row: found[row] for row in rows.tolist() if row in found}


def _tokens(table: Table, found: Mapping[int, Line], encode: Encode) -> dict[int, int]:
    """Tokens of each line that can be learnt from: known where the table is of the same text."""
    if not isinstance(table, AnswerTable | PromptTable):
        return {row: int(table.lengths[row]) for row in found}
    told = encode(list(found.values()), _kind(next(iter(found.values())))) if found else []
    return {
        row: len(each.input_ids)
        for row, each in zip(found, told, strict=True)
        if not isinstance(each, RowError)
    }


def _kind(line: Mapping[str, Any]) -> str:
    return "text" if "text" in line else "prompt_completion"
