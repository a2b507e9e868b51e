"""Prompts for reinforcement learning: what is asked, with the row that rewards read, kept on disk.

Knows no rollout: `take` answers with the fields of a rollout's prompt. The order is the mixture's: a function
of (seed, epoch). Letters: n prompts, T tokens of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from framework.data import tables, templates, tokenise
from framework.data.chat import Encoder
from framework.data.fields import RowError
from framework.data.mixture import Group, Mixture
from framework.data.records import PROMPTS, parse_prompt
from framework.data.sources import Source
from framework.data.tables import Part, Table, starts
from framework.data.tokenise import Cached, Progress
from framework.errors import ConfigError

ARRAYS = {**tables.ARRAYS, "rows": "|u1", "row_bytes": "<i4"}  # each row as JSON


@dataclass(frozen=True)
class Prompt:
    """What is to be answered: the fields of `rollout.base.Prompt`."""

    ids: tuple[int, ...]  # token ids, the generation prompt of the chat template included
    index: int  # place in the stream of prompts: it counts on from epoch to epoch
    row: Mapping[str, Any]  # the data's row, for rewards


@dataclass(frozen=True)
class PromptTable(Table):
    """The n prompts of one source; none of their tokens is trained."""

    _row_offsets: np.ndarray  # [n + 1] int64, bytes

    @classmethod
    def of(cls, cached: Cached) -> Self:
        """The table over arrays on disk."""
        return cls(**vars(Table.of(cached)), _row_offsets=starts(cached.arrays["row_bytes"]))

    def row(self, row: int) -> dict[str, Any]:
        """The data's row as it was read."""
        part = slice(self._row_offsets[row], self._row_offsets[row + 1])
        read: dict[str, Any] = json.loads(self._arrays["rows"][part].tobytes())
        return read

    def parts(self, row: int) -> list[Part]:
        """One prompt for people."""
        return [Part("prompt", *self.example(row))]


class Prompts:
    """The stream of prompts of a run: every prompt once an epoch, in an order keyed by (seed, epoch).

    With weights in the tables' sources, they take turns as `data.mixture` says.
    """

    def __init__(self, tables: Sequence[PromptTable], *, seed: int, shuffle: bool = True) -> None:
        weights = [table.weight for table in tables if table.weight is not None]
        ones = [np.ones(len(table), dtype=np.int64) for table in tables]
        self.tables = tables
        self.mixture = Mixture(Group(ones, weights or None), seed=seed, shuffle=shuffle)

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return sum(map(len, self.tables))

    def take(self, start: int, stop: int) -> list[Prompt]:
        """Prompts start..stop-1 of the stream, which does not end."""
        picks = self.mixture.picks(start, stop)
        return [
            Prompt(
                tuple(self.tables[pick.source].example(pick.row)[0].tolist()),
                index,
                self.tables[pick.source].row(pick.row),
            )
            for index, pick in enumerate(picks, start=start)
        ]

    def epochs(self, index: int) -> float:
        """Epochs in the first `index` prompts."""
        return self.mixture.epochs(index)


def prepare(
    wanted: Sequence[Source],
    *,
    tokenizer: Any,
    chat_template: str | None = None,
    max_prompt_tokens: int,
    truncation: str = "error",
    on_bad_row: str = "error",
    cache_dir: str | Path,
    workers: int | None = 1,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> list[PromptTable]:
    """One table of prompts per source; settings as in `tables.prepare`.

    Rows with a `prompt` (a string is plain text, messages are rendered with the generation prompt) or with a
    conversation, of which the prompt is everything before the last assistant turn. `truncation` of prompts
    over `max_prompt_tokens`: "error" refuses, "drop" leaves out and counts them as "over-long".

    Raises DataError for files and rows, ModelError for the tokenizer and its template, ConfigError for a
    truncation that would cut a question.
    """
    if truncation not in ("error", "drop"):
        raise ConfigError(
            f"data.truncation={truncation}: a prompt that is cut asks something else; expected error or "
            "drop: type data.truncation=drop"
        )
    template = templates.resolve(tokenizer, chat_template)
    settings: dict[str, Any] = {
        "max_length": max_prompt_tokens,
        "truncation": truncation,
        "vocab_size": vocab_size,
    }
    identity = {
        "kind": "prompts",
        "tokenizer": tokenise.tokenizer_identity(tokenizer),
        "template": template,
        **settings,
    }
    found = tokenise.prepare(
        wanted,
        PromptReader(Encoder(tokenizer, template, train_on="assistant", **settings)),
        identity=identity,
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
        workers=workers,
        progress=progress,
    )
    return [PromptTable.of(cached) for cached in found]


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, tokenised, with its row."""

    ids: np.ndarray  # [T] int32
    row: bytes  # JSON
    truncated = False

    def columns(self) -> dict[str, Any]:
        """What a table keeps of it."""
        return {
            "tokens": self.ids,
            "trained": np.zeros(len(self.ids), dtype=bool),
            "lengths": [len(self.ids)],
            "counts": [0],
            "rows": np.frombuffer(self.row, dtype=np.uint8),
            "row_bytes": [len(self.row)],
        }


class PromptReader:
    """Reads rows that ask something."""

    formats = tuple(PROMPTS)
    arrays = ARRAYS

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.truncation = encoder.truncation

    def read(self, values: Sequence[Any], format: str) -> list[EncodedPrompt | RowError]:
        """A prompt or a refusal for each row, in order."""
        encoded = tables.through(values, partial(parse_prompt, format=format), self.encoder.prompts)
        return [
            ids if isinstance(ids, RowError) else EncodedPrompt(ids, _json(value))
            for value, ids in zip(values, encoded, strict=True)
        ]


def _json(row: Any) -> bytes:
    """A row as it can be read again; what JSON cannot say (a date from Parquet) becomes text."""
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
