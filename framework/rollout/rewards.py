"""Functions that judge one answer, and what a function of your own looks like:

    def reward(answer: str, row: Mapping[str, Any], *, bonus: float = 1.0) -> float:
        return bonus * (row["answer"] in answer)

A reward asks for what it needs by parameter name (`pool.SUPPLIED`) and gets its other parameters from the
configuration; it raises or returns no finite number where it cannot judge, never 0. Runs in a process of
its own (`pool`), so this file imports no torch. Knows no model, no stage and no task library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from framework.rollout.base import Completion

Row = Mapping[str, Any]

Score = Callable[[str, Row], float]
"""(answer, row) -> 0 to 1, the verdict of a task's own verifier."""


def exact(
    answer: str, row: Row, *, field: str = "answer", inside: str | None = None, ignore_case: bool = False
) -> float:
    """1 where the answer is `row[field]`, white space around both left out, else 0.

    With `inside` only what stands between the last <inside> and </inside> is compared; without them, 0.
    """
    said: str | None = answer if inside is None else _inside(answer, inside)
    right = _field(row, field).strip()
    if said is None:
        return 0.0
    said = said.strip()
    return float(said.lower() == right.lower() if ignore_case else said == right)


def contains(answer: str, row: Row, *, field: str = "answer", ignore_case: bool = False) -> float:
    """1 where `row[field]` occurs in the answer. Listing everything earns it too: pair it with a penalty."""
    right = _field(row, field).strip()
    return float(right.lower() in answer.lower() if ignore_case else right in answer)


def regex(answer: str, *, pattern: str) -> float:
    """1 where `pattern` (Python's `re`, the dot takes line ends) matches somewhere in the answer, else 0."""
    return float(re.search(pattern, answer, re.DOTALL) is not None)


def format_tags(answer: str, *, tags: Sequence[str] = ("think", "answer")) -> float:
    """1 where the answer is <tag>...</tag> for each of `tags` in this order, once each, and nothing else."""
    parts = [rf"\s*<{re.escape(tag)}>(?P<part{n}>.*?)</{re.escape(tag)}>" for n, tag in enumerate(tags)]
    found = re.fullmatch("".join(parts) + r"\s*", answer, re.DOTALL)
    if found is None:
        return 0.0
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    return float(all(answer.count(mark) == 1 for mark in marks))


def math(answer: str, row: Row, *, field: str = "answer") -> float:
    """1 where the answer's last result equals `row[field]` as mathematics (1/3 = 2/6 = \\frac13), else 0.

    By math-verify (Kydlíček, Hugging Face 2025). Equality is generous: 50% equals 0.5 and 50. Raises
    ValueError where the row's own result cannot be read.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def read(text: str) -> list[Any]:
        # its own time limits need signals; the pool's do not
        ways = [LatexExtractionConfig(), ExprExtractionConfig()]
        results: list[Any] = parse(text, extraction_config=ways, parsing_timeout=None)
        return results

    right = _field(row, field)
    expected = read(right) or read(f"${right}$")
    if not expected:
        raise ValueError(f"row[{field!r}] is {right!r}; expected a number or a formula")
    return float(verify(expected, read(answer), timeout_seconds=None))


def length_penalty(tokens: int, *, free: int, per_token: float) -> float:
    """-per_token * max(0, tokens - free): every token beyond `free` costs."""
    return -per_token * max(0, tokens - free)


def overlong(tokens: int, *, max_tokens: int, buffer: int) -> float:
    """0 up to max_tokens - buffer, then falling in a straight line to -1 at `max_tokens` and beyond.

    Soft over-long punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13). `buffer` is from 1 to
    `max_tokens`, which is the rollout's limit of new tokens.
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"buffer={buffer} must be from 1 to max_tokens={max_tokens}")
    return -min(1.0, max(0.0, (tokens - (max_tokens - buffer)) / buffer))


def repetition_penalty(answer: str, *, words: int = 3, most: float = 1.0) -> float:
    """-most * (1 - different / all) of the answer's runs of `words` words; 0 where it has none."""
    said = answer.lower().split()
    runs = [tuple(said[start : start + words]) for start in range(len(said) - words + 1)]
    return -most * (1 - len(set(runs)) / len(runs)) if runs else 0.0


def verified(score: Score, rows: Sequence[Row]) -> Callable[[Sequence[Completion]], Tensor]:
    """Completions in order -> [N] fp32, in this process: for verifiers that are trusted and quick.

    1 where the answer to the row at the same place is exactly right and ended by itself, else 0.
    Partial credit is not passed on: verifiers pay for containing the answer or for any permutation of
    it, and a policy learns to collect that. An answer that never ends is not an answer.
    """
    import torch

    def reward(completions: Sequence[Completion]) -> Tensor:
        right = [c.finished and score(c.text, row) == 1.0 for c, row in zip(completions, rows, strict=True)]
        return torch.tensor(right, dtype=torch.float32)

    return reward


def _field(row: Row, field: str) -> str:
    if field not in row:
        raise KeyError(f"the row has no {field!r}; it has {', '.join(sorted(row))}")
    return str(row[field])


def _inside(answer: str, tag: str) -> str | None:
    begin, end = f"<{tag}>", f"</{tag}>"
    start = answer.rfind(begin)
    stop = answer.find(end, start)
    return answer[start + len(begin) : stop] if start >= 0 and stop >= 0 else None
