"""One command after another, each a child that gets every signal exactly once.

A pipeline's stages save and leave on a signal, and leave at once on a second one. A child therefore lives
in a process group of its own: Ctrl-C reaches the pipeline alone, which passes it on, once.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from framework.cluster.worker import PR_SET_PDEATHSIG

FORWARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Children:
    """While entered, signals go on to the child that is running; `stopped` says that one was to end it.

    Should this process be killed, the child gets SIGTERM: it saves and leaves.
    """

    def __init__(self) -> None:
        self.stopped: signal.Signals | None = None  # the first that asked for an end
        self._running: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Callable[..., object] | int | None] = {}

    def __enter__(self) -> Children:
        for number in FORWARD:
            self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """Start `command` and wait for its end. Returns its exit status, 128 + N for one ended by signal N.

        Starts nothing once a stop was asked for, and returns 128 + that signal.
        """
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARD)  # until there is a child to pass them to
        try:
            if self.stopped is not None:
                return 128 + self.stopped
            prepare = _prepare(blocked)
            self._running = subprocess.Popen(list(command), process_group=0, preexec_fn=prepare)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        status = self._running.wait()
        self._running = None
        return status if status >= 0 else 128 - status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number in STOP and self.stopped is None:
            self.stopped = signal.Signals(number)
        if self._running is not None:
            self._running.send_signal(number)


def _prepare(mask: set[int | signal.Signals]) -> Callable[[], None]:
    """What the child does before it becomes `command`: take signals again, and die with its parent."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return prepare
