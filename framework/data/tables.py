"""Tokenised sources: examples with random access, made once and kept on disk.

`prepare` reads, normalises, renders and tokenises every source and answers one `Table` each. Letters: n
examples, T tokens of one example. It knows no mixture, no batch and no rank; all processes of a host share
the memory-mapped result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from framework.data import sources, templates, tokenise
from framework.data.chat import Encoded, Encoder
from framework.data.fields import RowError
from framework.data.records import FORMATS, parse
from framework.data.sources import Source
from framework.data.tokenise import Cached, Counts, Progress

ARRAYS = {"tokens": "<i4", "trained": "|b1", "lengths": "<i4", "counts": "<i4"}


class Part(NamedTuple):
    """A stretch of an example as people are shown it."""

    title: str  # empty where the whole example is one part
    ids: np.ndarray  # [T] int32
    trained: np.ndarray  # [T] bool


@dataclass(frozen=True)
class Table:
    """The n examples of one source."""

    name: str
    fingerprint: str  # of content, tokenizer, template and settings: equal means equal examples
    format: str
    counts: Counts
    lengths: np.ndarray  # [n] int32, tokens
    trained: np.ndarray  # [n] int32, trained tokens: never 0
    weight: float | None
    _files: tuple[str, ...]
    _arrays: dict[str, np.ndarray]
    _offsets: np.ndarray  # [n + 1] int64, first token of each example

    @classmethod
    def of(cls, cached: Cached) -> Self:
        """The table over arrays on disk."""
        lengths = np.asarray(cached.arrays["lengths"])
        return cls(
            name=cached.name,
            fingerprint=cached.fingerprint,
            format=cached.format,
            counts=cached.counts,
            lengths=lengths,
            trained=np.asarray(cached.arrays["counts"]),
            weight=cached.weight,
            _files=cached.files,
            _arrays=cached.arrays,
            _offsets=starts(lengths),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids [T] int32, trained [T] bool) of one example, as views of the file.

        `trained[t]` says that token t is learnt from the tokens before it; `trained[0]` is never set.
        """
        part = slice(self._offsets[row], self._offsets[row + 1])
        return self._arrays["tokens"][part], self._arrays["trained"][part]

    def parts(self, row: int) -> list[Part]:
        """One example for people."""
        return [Part("", *self.example(row))]

    def places(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """(file, line) of examples, as `sources.Placed` counts them."""
        files, lines = self._arrays["files"][rows], self._arrays["lines"][rows]
        return list(zip(files.tolist(), lines.tolist(), strict=True))

    def where(self, row: int) -> str:
        """The place of an example, for messages: `train.jsonl:17`."""
        return sources.place(self._files[self._arrays["files"][row]], int(self._arrays["lines"][row]))


def starts(lengths: np.ndarray) -> np.ndarray:
    """[n + 1] int64: where each of n stretches that lie end to end begins, then where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def prepare(
    wanted: Sequence[Source],
    *,
    tokenizer: Any,
    chat_template: str | None = None,
    max_length: int,
    truncation: str = "error",
    train_on: str = "assistant",
    on_bad_row: str = "error",
    cache_dir: str | Path,
    workers: int | None = 1,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> list[Table]:
    """One table per source, from the cache where it holds the same content under the same settings.

    `chat_template` as in `templates.resolve`; `max_length` in tokens; `truncation` and `train_on` as in
    `chat.Encoder`. `on_bad_row`: "error" refuses the first malformed, empty or untrainable row, "drop"
    counts it by reason. `workers` processes tokenise large sources (None: one per core); the result
    does not depend on them. `vocab_size`: token ids must stay below it.

    Raises DataError for files and rows, ModelError for the tokenizer and its template.
    """
    template = templates.resolve(tokenizer, chat_template)
    settings: dict[str, Any] = {
        "max_length": max_length,
        "truncation": truncation,
        "train_on": train_on,
        "vocab_size": vocab_size,
    }
    identity = {"tokenizer": tokenise.tokenizer_identity(tokenizer), "template": template, **settings}
    found = tokenise.prepare(
        wanted,
        Conversations(Encoder(tokenizer, template, **settings)),
        identity=identity,
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
        workers=workers,
        progress=progress,
    )
    return [Table.of(cached) for cached in found]


class Conversations:
    """Reads what supervised fine-tuning trains on: conversations and texts."""

    formats = tuple(FORMATS)
    arrays = ARRAYS

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.truncation = encoder.truncation

    def read(self, values: Sequence[Any], format: str) -> list[Encoded | RowError]:
        """An example or a refusal for each row, in order."""
        return through(values, lambda value: parse(value, format), self.encoder.encode)


Parsed = TypeVar("Parsed")
Made = TypeVar("Made")


def through(
    values: Sequence[Any],
    parse: Callable[[Any], Parsed],
    encode: Callable[[list[Parsed]], Sequence[Made | RowError]],
) -> list[Made | RowError]:
    """Parse every row, encode together what could be parsed, and answer for all of them in order."""
    parsed: list[Parsed | RowError] = []
    for value in values:
        try:
            parsed.append(parse(value))
        except RowError as error:
            parsed.append(error)
    encoded = iter(encode([each for each in parsed if not isinstance(each, RowError)]))
    return [each if isinstance(each, RowError) else next(encoded) for each in parsed]
