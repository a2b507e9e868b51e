"""One command after another, each a child that gets every signal exactly once.

A pipeline's stages save and leave on a signal, and leave at once on a second one. A child therefore lives
in a process group of its own: Ctrl-C reaches the pipeline alone, which passes it on, once.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import BinaryIO

from framework.cluster.worker import PR_SET_PDEATHSIG

FORWARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.2  # between two looks whether somebody else asks for an end


class Children:
    """While entered, signals go on to the child that is running; `stopped` says that one was to end it.

    `signals` maps those that this process gets to those that it passes on. Should this process be killed, the
    child gets SIGTERM: it saves and leaves.
    """

    def __init__(self, signals: Mapping[signal.Signals, signal.Signals] | None = None) -> None:
        self.stopped: signal.Signals | None = None  # the first that asked for an end
        self._signals = {number: number for number in FORWARD} if signals is None else dict(signals)
        self._running: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Callable[..., object] | int | None] = {}

    def __enter__(self) -> Children:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def run(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        output: BinaryIO | None = None,
        inherited: Sequence[int] = (),
        asked: Callable[[], int] | None = None,
    ) -> int:
        """Start `command` and wait for its end. Returns its exit status, 128 + N for one ended by signal N.

        Starts nothing once a stop was asked for, and returns 128 + that signal. `output` takes what the child
        writes, `inherited` are file descriptors it keeps open. `asked` says how often somebody else has asked
        for an end: the child gets SIGINT as often.
        """
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARD)  # until there is a child to pass them to
        try:
            if self.stopped is not None:
                return 128 + self.stopped
            self._running = subprocess.Popen(
                list(command),
                process_group=0,
                preexec_fn=_prepare(blocked - set(FORWARD)),
                env=None if environment is None else dict(environment),
                stdout=output,
                stderr=output,
                pass_fds=tuple(inherited),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        status = self._running.wait() if asked is None else self._watch(self._running, asked)
        self._running = None
        return status if status >= 0 else 128 - status

    def _watch(self, child: subprocess.Popen[bytes], asked: Callable[[], int]) -> int:
        told = 0
        while True:
            try:
                return child.wait(POLL_S)
            except subprocess.TimeoutExpired:
                if asked() > told:
                    told += 1
                    child.send_signal(signal.SIGINT)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        passed = self._signals[signal.Signals(number)]
        if passed in STOP and self.stopped is None:
            self.stopped = signal.Signals(number)
        if self._running is not None:
            self._running.send_signal(passed)


def _prepare(mask: set[int | signal.Signals]) -> Callable[[], None]:
    """What the child does before it becomes `command`: take signals again, and die with its parent."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return prepare
