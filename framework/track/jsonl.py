"""metrics.jsonl, the record that every other one can be rebuilt from: one JSON object a line.

    {"kind": "train", "step": 20, "loss": 1.25, "lr": 1e-05, ...}

JSON has no NaN and no infinities: they are the strings "NaN", "Infinity" and "-Infinity", which
`float` reads back. Lines reach the file whole and at once, so it can be followed while a run trains.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class Jsonl:
    """Appends every record to `path`.

    `resume_step` is the step that the run goes on from: lines after its checkpoint, which the run will
    write again, are cut, and so is a line that a crash left half written. None starts a new file; a
    record that is there already is kept as *.previous.jsonl.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int | None = None,
        say: Callable[[str], None] = logging.getLogger(__name__).warning,
    ) -> None:
        self._path = Path(path)
        self._say = say
        self._unwritten = b""  # what a full disk has not taken yet
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            if resume_step is None:
                os.replace(self._path, self._path.with_suffix(".previous.jsonl"))
            else:
                cut(self._path, resume_step)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        if resume_step is not None:
            self.log("event", {"message": f"resumed from step {resume_step}"}, step=resume_step)

    def log(self, kind: str, metrics: Mapping[str, Any], *, step: int) -> None:
        line = json.dumps(_plain({"kind": kind, "step": step, **metrics}), allow_nan=False)
        taking = not self._unwritten
        self._unwritten += line.encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            if taking:
                self._say(f"{self._path}: {error.strerror}; lines wait in memory until it takes them")

    def artifact(self, path: Path, *, kind: str) -> None:
        """Artifacts are found by their place in the run directory."""

    def close(self, status: str) -> None:
        os.close(self._file)


def read(path: Path, *, most: int | None = None) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, or of its first `most` bytes; not a last line that a crash cut off."""
    seen = 0
    with open(path, "rb") as file:
        for line in file:
            seen += len(line)
            if line.endswith(b"\n") and (most is None or seen <= most):
                yield json.loads(line.decode(errors="replace"))


def numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it was logged: what stands for NaN and infinities is a number again."""
    return {key: float(value) if value in NOT_FINITE else value for key, value in record.items()}


def cut(path: Path, step: int) -> None:
    """Leave out the lines beyond `step`, and a last one that is not whole, in one durable move.

    A rollout stands under the step before its first update, so one of `step` itself came after the
    checkpoint: it goes, too, with what follows it. An evaluation of `step` came before and stays.
    """
    kept, repeated = "", False
    for record in read(path):
        repeated = repeated or (record["kind"] == "rollout" and record["step"] == step)
        if record["step"] < step or (record["step"] == step and not repeated):
            kept += json.dumps(record) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """`value` as JSON without NaN or infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
