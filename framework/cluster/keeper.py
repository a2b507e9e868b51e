"""The process that keeps a sweep, and what ties its jobs to it wherever they run.

Jobs may be children of this process, of a pool's workers or of a queue on other machines, so they are not
reached by signals. A stop is written into a file of the sweep's directory, and every job looks there. The
keeper and all it starts live in a process group of their own, where a terminal's Ctrl-C does not reach a
pool's workers behind its back.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from framework.cluster.records import FOLDER

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""SIGUSR1 comes from SLURM ahead of the time limit of an allocation in which a whole sweep runs."""

LEAVE_AT_ONCE = 3  # stops asked for, until waiting for the jobs ends, too


@dataclass(frozen=True)
class Ties:
    """What a job knows of its keeper: where stops are written, and which process it is."""

    stops: Path
    host: str
    process: int
    born: str  # clock ticks since the machine's start: a process id alone may be used again
    allocation: str | None  # of SLURM, where there is one

    @property
    def here(self) -> bool:
        """This process is the keeper itself."""
        return (self.host, self.process) == (socket.gethostname(), os.getpid())

    @property
    def together(self) -> bool:
        """This process shares the keeper's host and its devices, and ends when the keeper does."""
        return self.host == socket.gethostname() and self.allocation == _allocation()

    def asked(self) -> int:
        """How often a stop was asked for; at least once where the keeper is gone and should be there."""
        try:
            said = len(self.stops.read_text().splitlines())
        except FileNotFoundError:
            said = 0
        return max(said, int(self.gone))

    @property
    def gone(self) -> bool:
        """The keeper has ended, as it does not while its jobs run unless it was killed."""
        return self.together and not self.here and _born(self.process) != self.born


class Keeper:
    """While entered, signals that ask for an end are written down for the jobs of the sweep."""

    def __init__(self, sweep: Path) -> None:
        process = os.getpid()
        stops = sweep / FOLDER / f"stop-{uuid.uuid4().hex[:8]}"
        self.ties = Ties(stops, socket.gethostname(), process, _born(process), _allocation())
        self.stopped: signal.Signals | None = None  # the first that asked for an end
        self._asked = 0
        self._before: dict[signal.Signals, Callable[..., object] | int | None] = {}

    def __enter__(self) -> Keeper:
        for number in STOP:
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
        if self._asked < LEAVE_AT_ONCE:  # else some job has still to read it
            self.ties.stops.unlink(missing_ok=True)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, as all of Python's handlers do."""
        self._asked += 1
        self.stopped = self.stopped or signal.Signals(number)
        self.ties.stops.parent.mkdir(parents=True, exist_ok=True)
        with self.ties.stops.open("a") as file:
            file.write(f"{self.stopped.name}\n")
        if self._asked == 1:
            said = (
                f"\n{self.stopped.name}: no further job starts, those that run save and leave; once more to "
                "end them at once, a third time not to wait for them\n"
            )
            os.write(sys.stderr.fileno(), said.encode())  # not print, which may have been interrupted
        elif self._asked >= LEAVE_AT_ONCE:
            raise KeyboardInterrupt


def _allocation() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def _born(process: int) -> str:
    """When a process started; "" for one that has ended (proc(5), stat, fields 3 and 22)."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()
    return "" if state == "Z" else rest[18]
