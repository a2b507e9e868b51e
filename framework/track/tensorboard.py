"""TensorBoard's event files, whose library has its only home here: `tensorboard --logdir RUN_DIR/tensorboard`

Numbers are called as `panels` says, so that its sections are those of every dashboard; samples are text,
shown as it is and never read as markup. A run that goes on hides what it takes again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from framework.track import jsonl, panels

FOLDER = "tensorboard"


class TensorBoard:
    """Writes `run_dir`/tensorboard, every line at once. Goes behind the tracker that writes metrics.jsonl.

    `resume_step` is the step that the run goes on from, None a new run. Everything from that step on is
    purged, and what metrics.jsonl has kept of it is written again; or the whole run where none was written.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None = None) -> None:
        where = run_dir / FOLDER
        first = resume_step if resume_step is not None and any(where.glob("events.*")) else 0
        self._writer = SummaryWriter(str(where), purge_step=first)
        metrics = run_dir / "metrics.jsonl"
        for line in jsonl.read(metrics) if metrics.exists() else ():
            kind, step = line.pop("kind"), line.pop("step")
            if step >= first:
                self._write(kind, jsonl.numbers(line), step)
        self._writer.flush()

    def log(self, kind: str, metrics: Mapping[str, Any], *, step: int) -> None:
        self._write(kind, metrics, step)
        self._writer.flush()  # else the last two minutes of a killed run would be lost

    def artifact(self, path: Path, *, kind: str) -> None:
        """Artifacts are found by their place in the run directory."""

    def close(self, status: str) -> None:
        self._writer.close()

    def _write(self, kind: str, metrics: Mapping[str, Any], step: int) -> None:
        if kind == "samples":
            self._writer.add_text("samples", "\n\n---\n\n".join(map(_text, metrics["rows"])), step)
        elif kind == "event":
            self._writer.add_text("events", _verbatim(str(metrics["message"])), step)
        else:
            for name, value in panels.placed(kind, metrics).items():
                self._writer.add_scalar(name, value, step)


def _text(row: Mapping[str, Any]) -> str:
    """One sample, column under column."""
    return "\n\n".join(f"**{column}**\n\n{_verbatim(str(value))}" for column, value in row.items())


def _verbatim(text: str) -> str:
    """Markdown for text that is shown as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
