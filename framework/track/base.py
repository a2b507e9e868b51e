"""The contract of a tracker: one place that metrics are written to. Knows nothing of training.

A tracker never stops a run: what goes wrong in it is said once and then swallowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Receives the run's record on rank 0."""

    def log(self, kind: str, metrics: Mapping[str, Any], *, step: int) -> None:
        """`kind` is train, eval, retain, rollout, samples or event; `step` optimizer steps done."""

    def artifact(self, path: Path, *, kind: str) -> None:
        """A file or directory worth keeping: checkpoint, model, report."""

    def close(self, status: str) -> None:
        """`status` is done, interrupted or failed. Called once, last."""
