"""One small run of every stage that learns from judgements or a teacher, through the whole configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import workers

from framework.config.cells import STAGES as EVERY
from framework.config.cells import STEPS, arguments
from framework.config.measured import measure
from framework.config.specimens import WORDS, write, write_teacher

__all__ = ["STAGES", "WORDS", "arguments", "measure", "run", "write", "write_teacher"]

STAGES = [kind for kind in EVERY if kind != "sft"]


def run(size: int, kind: str, place: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Ten steps on `size` ranks, which must agree among themselves."""
    line = arguments(kind, place, model, **changes)
    ranks = workers.run(size, measure, line, steps=STEPS, timeout_s=180)
    for rank in ranks:
        del rank["gradient"], rank["weights"]
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]
