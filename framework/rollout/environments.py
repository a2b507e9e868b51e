"""Prompts and their verifier as one thing: where rows come from and what an answer to one is worth.

An environment is a class with two methods, named by its dotted path and keywords. The trainer's process
asks it for rows; the processes of a `pool` make one of their own and ask it for scores, so making one must
be cheap and needs nothing but its keywords. Knows no model.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from framework.errors import DataError, UserError

Row = Mapping[str, Any]
Split = Literal["train", "held_out"]

TASKS = "framework.data.tasks"  # the home of reasoning-gym; a name, since this room knows no data


class Environment(Protocol):
    """What a class of your own looks like; it need not derive from this one."""

    def rows(self, split: Split) -> Sequence[Row]:
        """JSON-able rows, the same ones whenever asked. Each has a `prompt`: a string or messages."""

    def score(self, answer: str, row: Row) -> float:
        """What `answer` (special tokens removed) is worth. Raises where it cannot be judged."""


class ReasoningGym:
    """A family of procedural tasks with a verifier, such as "word_sequence_reversal".

    `settings` are the family's own, `train` and `held_out` numbers of rows. No held-out question or answer
    occurs in training, whatever the `seed`; other seeds share hardly a row. Raises DataError for an unknown
    family and one too small for this.
    """

    def __init__(
        self,
        family: str,
        settings: Mapping[str, Any] | None = None,
        *,
        train: int = 2000,
        held_out: int = 128,
        seed: int = 0,
    ) -> None:
        self.family, self.settings = family, dict(settings or {})
        self.train, self.held_out, self.seed = train, held_out, seed

    def rows(self, split: Split) -> Sequence[Row]:
        """Rows with `prompt` (messages), `answer` and what the verifier needs."""
        return self._rows[split]

    def score(self, answer: str, row: Row) -> float:
        """The family's own verdict, 0 to 1; parts are paid for, so only 1 means right."""
        return float(importlib.import_module(TASKS).score(answer, row))

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        tasks = importlib.import_module(TASKS)
        family = tasks.Family(self.family, self.settings)
        with tempfile.TemporaryDirectory() as place:
            written = tasks.write(
                Path(place), family, train=self.train, held_out=self.held_out, seed=self.seed
            )
            files = {"train": written.train, "held_out": written.held_out}
            return {split: [_asking(row) for row in tasks.read(path)] for split, path in files.items()}


def read(environment: Environment, split: Split) -> list[Row]:
    """The rows of `environment`, checked.

    Raises DataError where it raises, where it has none, and for a row that cannot be asked or carried.
    """
    asked = f"{type(environment).__name__}.rows({split!r})"
    try:
        rows = list(environment.rows(split))
    except UserError:
        raise
    except Exception as problem:  # whatever a class of the user's raises
        raise DataError(f"{asked} raised {told(problem)}; expected a sequence of rows") from problem
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{asked}[{number}] is {row!r:.200}; expected a mapping with a prompt")
        prompt = row.get("prompt")
        if not (prompt and isinstance(prompt, str | Sequence)):
            raise DataError(
                f"{asked}[{number}] has prompt={prompt!r:.200}; expected a text or a list of messages"
            )
        try:
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as problem:
            raise DataError(
                f"{asked}[{number}] cannot be written as JSON, which the verifier's process needs: {problem}"
            ) from problem
    if not rows:
        raise DataError(f"{asked} is empty; expected at least one row")
    return rows


def told(problem: Exception) -> str:
    """What code that is not ours raised, and where."""
    last = traceback.extract_tb(problem.__traceback__)[-1]
    return f"{type(problem).__name__}: {problem} ({last.filename}:{last.lineno})"


def _asking(row: dict[str, Any]) -> Row:
    messages = row.pop("messages")
    return {"prompt": messages[:-1], **row}
