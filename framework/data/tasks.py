"""Procedural tasks from reasoning-gym, written as JSONL rows to train on and to score answers with.

The only home of reasoning-gym, imported when first needed because its import takes seconds. Knows no
model. A row is a conversation in `messages` plus `family`, `question`, `answer`, `index`, `metadata`:
all that the family's own verifier asks for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from framework.errors import DataError

Row = dict[str, Any]

SEEDS_APART = 1_000_000_000
"""Item i of a family is drawn from Random(seed + i): neighbouring seeds share nearly all their items."""


@dataclass(frozen=True)
class Family:
    """A task family and its settings, for example `Family("word_sequence_reversal", {"max_words": 6})`."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """Where a task was written and what was left out on the way."""

    train: Path
    held_out: Path
    train_rows: int
    held_out_rows: int
    repeated: int  # items whose question was there before in the same file
    leaked: int  # held-out items whose question or answer occurs in training


def write(directory: Path, family: Family, *, train: int, held_out: int, seed: int = 0) -> Written:
    """Write `train.jsonl` and `held-out.jsonl` with that many rows each.

    No held-out question and no held-out answer occurs in training: items that would are drawn again
    and counted. Raises DataError when the family is unknown or too small to keep the two apart.
    """
    questions: set[str] = set()
    answers: set[str] = set()
    asked: set[str] = set()
    kept: list[Row] = []
    tested: list[Row] = []
    repeated = leaked = 0
    for row in _draw(family, seed * 2 * SEEDS_APART, most=10 * train):
        if row["question"] in questions:
            repeated += 1
            continue
        questions.add(row["question"])
        answers.add(row["answer"])
        kept.append(row)
        if len(kept) == train:
            break
    for row in _draw(family, (seed * 2 + 1) * SEEDS_APART, most=10 * held_out):
        if row["question"] in questions or row["answer"] in answers:
            leaked += 1
            continue
        if row["question"] in asked:
            repeated += 1
            continue
        asked.add(row["question"])
        tested.append(row)
        if len(tested) == held_out:
            break
    if len(kept) < train or len(tested) < held_out:
        raise DataError(
            f"{family.name} gave {len(kept)} different training items and {len(tested)} held-out items that "
            f"are not among them ({leaked} were); asked for {train} and {held_out}. Ask for fewer, or widen "
            "its settings"
        )
    directory.mkdir(parents=True, exist_ok=True)
    files = directory / "train.jsonl", directory / "held-out.jsonl"
    for path, rows in zip(files, (kept, tested), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Written(*files, len(kept), len(tested), repeated, leaked)


def read(path: Path) -> list[Row]:
    """Rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def score(answer: str, row: Mapping[str, Any]) -> float:
    """The family's own verdict on `answer`, 0 to 1. Below 1 families pay for parts: only 1.0 means right."""
    return float(_verifier(row["family"])(answer.strip(), row))


def questions(rows: Sequence[Row]) -> list[list[dict[str, str]]]:
    """The conversations of `rows` up to where the answer begins."""
    return [row["messages"][:-1] for row in rows]


def few_shot(rows: Sequence[Row], examples: Sequence[Row]) -> list[list[dict[str, str]]]:
    """Like `questions`, with `examples` and their answers shown as earlier turns."""
    shown = [message for example in examples for message in example["messages"]]
    return [[*shown, *asked] for asked in questions(rows)]


def majority_accuracy(train: Sequence[Row], held_out: Sequence[Row]) -> float:
    """Share of held-out rows solved by always giving the most common training answer."""
    answer, _ = Counter(row["answer"] for row in train).most_common(1)[0]
    return sum(score(answer, row) == 1.0 for row in held_out) / len(held_out)


def _draw(family: Family, seed: int, *, most: int) -> Iterator[Row]:
    gym = _gym()
    try:
        items = gym.create_dataset(family.name, size=most, seed=seed, **family.settings)
    except (ValueError, TypeError, AssertionError) as problem:
        raise DataError(f"reasoning-gym refuses the family {family.name!r}: {problem}") from problem
    for index in range(most):
        item = items[index]
        question = " ".join(
            item["question"].split()
        )  # a question is one line: templates see no stray newlines
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": item["answer"]}]
        yield {
            "messages": turns,
            "family": family.name,
            "question": question,
            "answer": item["answer"],
            "index": index,
            "metadata": json.loads(json.dumps(item["metadata"], default=str)),
        }


@cache
def _verifier(family: str) -> Any:
    return _gym().get_score_answer_fn(family)


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as problem:
        raise DataError(
            "procedural tasks need reasoning-gym, which is not installed; type: pip install 'sapwood[demo]'"
        ) from problem
    return reasoning_gym
