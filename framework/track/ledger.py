"""Which records a dashboard's page holds, so that a run that goes on adds what is missing and nothing twice.

A run that was killed has shown steps after its last checkpoint, which it takes again; and it may have been
killed, or cut off, before the page had what metrics.jsonl has. A page keeps its rows in the order they were
handed over, and says at most how many there are: the ledger knows which they were.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

OFFLINE = "offline-"  # how names of directories begin that wait for `wandb sync`
SENT = "*.synced"  # the mark it leaves in one


class Ledger:
    """`folder`/rows: a line `kind step` for each row, behind a line `> DIRECTORY` for each start.

    Rows of an offline directory that was never sent are on no page: the next start writes them again, in a
    directory that holds the whole run, and the old one is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "rows"
        self._have: Counter[str] = Counter()
        self._until = -1

    def begin(self, directory: str, *, count: int | None, last_step: int) -> None:
        """Go on in `directory`, on a page of `count` rows, or of an unknown number: all that were sent.

        Where the page has rows that nobody has written down, it has everything up to `last_step`.
        """
        rows: list[str] = []
        for name, its in self._parts():
            where = self._folder / name
            if name.startswith(OFFLINE) and name != directory and not any(where.glob(SENT)):
                shutil.rmtree(where, ignore_errors=True)
            else:
                rows += its
        if count is not None:
            self._until = last_step if count > len(rows) else -1
            rows = rows[:count]
        self._have = Counter(rows)
        temporary = self._path.with_name("rows.tmp")
        temporary.write_text("".join(f"{row}\n" for row in ["> earlier", *rows, f"> {directory}"]))
        os.replace(temporary, self._path)
        self._file = self._path.open("a", buffering=1)

    def lacks(self, kind: str, step: int) -> bool:
        """Whether the next record of this kind and step is to be handed over; then it counts as that."""
        row = f"{kind} {step}"
        if self._have[row] > 0:
            self._have[row] -= 1
            return False
        if step <= self._until:
            return False
        self._file.write(f"{row}\n")
        return True

    def _parts(self) -> Iterator[tuple[str, list[str]]]:
        """Each start's directory and rows. A line that a crash left half written counts for nothing."""
        if not self._path.exists():
            return
        name = "earlier"
        rows: list[str] = []
        for line in self._path.read_text().splitlines(keepends=True):
            if line.startswith("> "):
                yield name, rows
                name, rows = line[2:].strip(), []
            elif line.endswith("\n"):
                rows.append(line.strip())
        yield name, rows
