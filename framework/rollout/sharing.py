"""Raw answers on their way: from rank to rank, bit for bit, and into completions. Knows no engine."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from framework.rollout.base import Completion


@dataclass(frozen=True)
class Answer:
    """One answer as an engine gives it."""

    ids: list[int]
    logps: list[float]  # nats, fp32
    finished: bool


def gather(world: Any, answers: Sequence[Answer]) -> list[list[Answer]]:
    """The answers of every rank, in rank order, on every rank. Collective."""
    return [[_unpacked(each) for each in said] for said in world.gather([_packed(a) for a in answers])]


def completion(answer: Answer, tokenizer: Any, version: int) -> Completion:
    """With its text, and stamped with the version of the weights that drew it."""
    text = tokenizer.decode(answer.ids, skip_special_tokens=True)
    return Completion(text, tuple(answer.ids), answer.finished, tuple(answer.logps), version)


def _packed(answer: Answer) -> list[Any]:
    """As JSON."""
    numbers = np.array(answer.ids, "<i4"), np.array(answer.logps, "<f4")
    return [*(base64.b64encode(n.tobytes()).decode() for n in numbers), answer.finished]


def _unpacked(packed: Sequence[Any]) -> Answer:
    ids, logps, finished = packed
    read = base64.b64decode
    return Answer(
        np.frombuffer(read(ids), "<i4").tolist(), np.frombuffer(read(logps), "<f4").tolist(), finished
    )
