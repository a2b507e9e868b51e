"""Stopping between two optimizer steps: a signal becomes a request that training looks at.

A handler cannot save a checkpoint: it may run in the middle of a collective, on one rank of many.
So it only writes down that it was called. The trainer reduces `requested` over the ranks at every
step's end, and all of them save and leave together.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGTERM from a scheduler, SIGINT from a keyboard, SIGUSR1 from SLURM ahead of its time limit."""


class StopRequest:
    """While entered, signals ask for a stop instead of ending the process.

    Handlers never escalate: under every launcher the same signal may come several times while a
    checkpoint is being written. Who loses patience sends SIGKILL.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = STOP) -> None:
        self.signal: signal.Signals | None = None  # the first that came
        self._signals = signals
        self._before: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    @property
    def requested(self) -> bool:
        """A stop has been asked for."""
        return self.signal is not None

    def __enter__(self) -> Self:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
