"""What a sweep knows of its jobs: one small JSON file each, in SWEEP_DIR/jobs.

A file is named after the job's settings, so that a sweep started again finds what became of each. It is
written by one process at a time: the sweep's own before and after, the job's while it runs, which may be on
another machine of the same file system.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = "jobs"
SWEEP = "sweep.json"  # of the sweep itself

QUEUED, RUNNING = "queued", "running"
DONE, PRUNED, FAILED, REFUSED = "done", "pruned", "failed", "refused"
KILLED = "killed"  # from outside, so nothing is known about its settings
INTERRUPTED = "interrupted"  # asked to stop

FINAL = (DONE, PRUNED, FAILED)
"""Verdicts on a job's settings: started again, a sweep leaves such a job alone."""

Record = dict[str, Any]


def path(sweep: Path, name: str) -> Path:
    """Where the record of the job called `name` is kept."""
    return sweep / FOLDER / f"{name}.json"


def read(file: Path) -> Record:
    """A record; {} where there is none."""
    try:
        found: Record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def update(file: Path, changes: Mapping[str, Any]) -> Record:
    """Change some entries of a record, whole or not at all. Returns all of it."""
    record = {**read(file), **changes}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)
    return record


def every(sweep: Path) -> Sequence[Record]:
    """All records of a sweep, in the order of its jobs."""
    found = [read(file) for file in (sweep / FOLDER).glob("[!.]*.json")]
    return sorted(found, key=lambda record: (record.get("number", 0), record.get("started", "")))
