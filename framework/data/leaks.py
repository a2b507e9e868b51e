"""Rows of a probe that are trained on: a measure of forgetting must not see what is being learnt.

Two rows are the same when their tokens are, or when their texts are alike but for case, spaces, punctuation
and marks of the chat template. Of a question what counts is whether it is asked. Only rows of similar length
are read, and what was found is kept in the cache.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from framework.data import cache
from framework.data.answers import AnswerTable
from framework.data.prompts import PromptTable
from framework.data.tables import Table

CHUNK = 1024  # rows decoded at once
SHORTER, LONGER = 0.6, 1.6  # lengths, in tokens, that the same text can have when written otherwise


class Leak(NamedTuple):
    """A row of the probe and the row of training data that says the same."""

    probe: int
    trained: int


def find(
    probe: Table, rows: Sequence[int], trained: Table, tokenizer: Any, *, cache_dir: str | Path
) -> list[Leak]:
    """Every row of `probe` among `rows` that `trained` has, too, with the first place where it does.

    The texts of a row of judged answers are its prompt with each of them. Where `probe` has questions they
    are looked for among what `trained` asks: its prompts, and all that stands before an answer.
    """
    key = cache.fingerprint(
        {"version": 1, "probe": probe.fingerprint, "rows": list(rows), "trained": trained.fingerprint}
    )
    kept = Path(cache_dir).expanduser() / "leaks" / f"{key}.json"
    try:
        return [Leak(*pair) for pair in json.loads(kept.read_text())]
    except (OSError, ValueError, TypeError):
        found = _search(probe, rows, trained, tokenizer)
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, kept)
    return found


def normalised(text: str) -> str:
    """Letters and digits alone, of one form and case, words apart by one space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split())


def _search(probe: Table, rows: Sequence[int], trained: Table, tokenizer: Any) -> list[Leak]:
    def said(ids: Sequence[np.ndarray]) -> list[str]:
        texts: list[str] = tokenizer.batch_decode([one.tolist() for one in ids], skip_special_tokens=True)
        return texts

    own = [probe.example(row)[0] for row in rows]
    by_tokens = {ids.tobytes(): row for row, ids in zip(rows, own, strict=True)}
    by_text = {normalised(text): row for row, text in zip(rows, said(own), strict=True)}
    by_text.pop("", None)  # what has neither letters nor digits is compared by its tokens
    found: dict[int, int] = {}
    chunk: list[tuple[int, np.ndarray]] = []

    def compare() -> None:
        for (row, ids), text in zip(chunk, said([ids for _, ids in chunk]), strict=True):
            same = by_tokens.get(ids.tobytes(), by_text.get(normalised(text)))
            if same is not None:
                found.setdefault(same, row)
        chunk.clear()

    candidates = _asked(trained) if isinstance(probe, PromptTable) else _said(trained, set(map(len, own)))
    for row, ids in candidates:
        chunk.append((row, np.ascontiguousarray(ids, dtype=own[0].dtype)))
        if len(chunk) == CHUNK:
            compare()
    if chunk:
        compare()
    return [Leak(*pair) for pair in sorted(found.items())]


def _asked(table: Table) -> Iterator[tuple[int, np.ndarray]]:
    """(row, ids) of everything that is answered: a prompt, or a conversation up to where learning begins."""
    for row in range(len(table)):
        if isinstance(table, AnswerTable):
            yield row, table.judged(row).prompt
            continue
        ids, trained = table.example(row)
        if isinstance(table, PromptTable):
            yield row, ids
            continue
        for begin in np.flatnonzero(trained[1:] & ~trained[:-1]) + 1:
            yield row, ids[:begin]


def _said(table: Table, lengths: Collection[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(row, ids) of texts that are about as long as one of `lengths`."""
    if isinstance(table, AnswerTable):
        for row in range(len(table)):
            judged = table.judged(row)
            for answer in judged.ids:
                yield row, np.concatenate([judged.prompt, answer])
        return
    similar = np.zeros(int(table.lengths.max()) + 1, dtype=bool)
    for length in lengths:
        similar[int(SHORTER * length) : int(LONGER * length) + 1] = True
    for row in np.flatnonzero(similar[table.lengths]).tolist():
        yield row, table.example(row)[0]
