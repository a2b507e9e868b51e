"""Rows of a source as records, one by one, without a tokenizer: for what looks at text alone."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from framework.data import formats, sources
from framework.data.fields import RowError
from framework.data.records import FORMATS, PROMPTS, Record, parse, parse_prompt
from framework.data.sources import Source
from framework.errors import DataError

DETECTION_ROWS = 20  # first rows that must agree on a format


class Asked(NamedTuple):
    """A row to be answered."""

    row: Mapping[str, Any]  # as it was read
    record: Record  # up to where the answer begins
    gold: str | None  # the answer that it has
    where: str


def records(source: Source) -> Iterator[tuple[Mapping[str, Any], Record]]:
    """(row, record) of every row with something to learn; malformed ones are left out.

    Raises DataError where the source is not there or of no known format.
    """
    for row, _, format in _rows(source, FORMATS):
        try:
            yield row, parse(row, format)
        except RowError:
            continue


def asked(source: Source) -> Iterator[Asked]:
    """Every row of `source` that asks something. Raises DataError for one that does not."""
    for row, where, format in _rows(source, PROMPTS):
        try:
            record = parse_prompt(row, format)
        except RowError as error:
            raise DataError(f"{error.detail}; expected a prompt, or a conversation", path=where) from None
        yield Asked(row, record, _gold(row, format), where)


def said(record: Record) -> str:
    """All that is said in a record."""
    if record.text is not None:
        return record.text
    return "\n".join(message.content for message in record.messages)


def _gold(row: Mapping[str, Any], format: str) -> str | None:
    try:
        record = parse(row, "prompt_completion" if format == "prompt" else format)
    except RowError:
        return None
    return record.messages[-1].content if record.text is None else record.text[record.trained_from :]


def _rows(source: Source, among: Collection[str]) -> Iterator[tuple[Mapping[str, Any], str, str]]:
    """(row, place, format)"""
    located = sources.locate(source)
    rows = located.rows()
    first = list(itertools.islice(rows, DETECTION_ROWS))
    format: str | None = source.format
    try:
        if source.format == "auto":
            format = formats.detect([placed.value for placed in first], among)
    except RowError as error:
        raise DataError(f"{error}; expected one format", path=source.path) from None
    if format is None or format not in among:
        raise DataError(f"expected rows with {formats.expected(among)}", path=source.path)
    for placed in itertools.chain(first, rows):
        if not isinstance(placed.value, RowError):
            yield placed.value, located.where(placed.file, placed.line), format
