"""What the ranks of this machine write: each into its own log, rank 0 also onto the console.

Ranks write into pipes that one thread of the launcher reads, so the last words of a rank that is
killed are not lost, and logs of earlier starts are added to. Where the console is a terminal, rank 0
gets a terminal as well (a pty), and its log the text without colours and overwritten lines.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import selectors
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

CONTROL = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""ECMA-48 escape sequences: CSI, OSC and the two-byte ones."""

Mask = Callable[[str], str]
"""Text without what nobody is to read."""

LAST_LINES = 15  # of a rank that died without a word


def masked(data: bytes, mask: Mask) -> bytes:
    """What was written, masked; bytes that are no text stay what they are."""
    return mask(data.decode(errors="surrogateescape")).encode(errors="surrogateescape")


class Log:
    """One rank's log file: whole lines, as they would be left on paper, `mask`ed."""

    def __init__(self, path: Path, mask: Mask) -> None:
        self.path = path
        self._mask = mask
        self.tail: deque[str] = deque(maxlen=LAST_LINES)
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._rest = b""
        self._lock = threading.Lock()

    def write(self, data: bytes) -> None:
        """Take what a rank has written, which may end within a line."""
        with self._lock:
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                plain = masked(CONTROL.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2], self._mask)
                self.tail.append(plain.decode(errors="replace"))
                self._file.write(plain + b"\n")
            overwritten = self._rest.rstrip(b"\r").rfind(b"\r") + 1
            self._rest = self._rest[overwritten:]  # a live line may be drawn for days and never end

    def note(self, text: str) -> None:
        """Lines of the launcher's own."""
        with self._lock:
            self._file.write(text.encode() + b"\n")

    def close(self) -> None:
        if self._rest:
            self.write(b"\n")
        self._file.close()


class Output(LogsSpecs):
    """Where elastic lets the workers of one gang write, and the variables it starts them with."""

    def __init__(
        self, log_dir: Path, failures: Path, environment: dict[str, str], *, mask: Mask = str
    ) -> None:
        """`failures` is a directory for the error files of workers that raise. `mask` hides secrets."""
        super().__init__(str(log_dir))
        self.mask = mask
        self._held: dict[int, bytes] = {}  # console -> the begun line that is not shown yet
        self.logs: dict[int, Log] = {}  # by rank
        self._log_dir, self._failures, self._environment = log_dir, failures, environment
        self._attempt = "0"
        self._writers: dict[int, tuple[int, int]] = {}  # local rank -> file descriptors (out, err)
        self._terminals: list[int] = []
        self._closed_consoles: set[int] = set()
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = os.pipe()
        self._descriptors = [self._wake_reader]  # to close at the end
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._pump, name="output", daemon=True)

    @property
    def root_log_dir(self) -> str:
        return str(self._log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called by elastic before it starts workers, and again before it restarts them."""
        self._attempt = envs[0]["TORCHELASTIC_RESTART_COUNT"]
        destination = LogsDest()
        for local_rank, environment in envs.items():
            rank = int(environment["RANK"])
            if local_rank not in self._writers:
                self._log_dir.mkdir(parents=True, exist_ok=True)
                self.logs[rank] = Log(self._log_dir / f"rank-{rank}.log", self.mask)
                self._writers[local_rank] = self._channels(rank)
            self.logs[rank].note(
                f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} start, attempt {int(self._attempt) + 1}"
            )
            out, err = self._writers[local_rank]
            destination.stdouts[local_rank] = f"/proc/self/fd/{out}"
            destination.stderrs[local_rank] = f"/proc/self/fd/{err}"
            failure = str(self.failure_file(rank))
            destination.error_files[local_rank] = failure
            environment.update(self._environment)
            environment["TORCHELASTIC_ERROR_FILE"] = failure
        if not self._thread.is_alive():
            self._thread.start()
        return destination

    def failure_file(self, rank: int) -> Path:
        """Where a rank of this attempt writes why it fails."""
        return self._failures / f"{self._attempt}-{rank}.json"

    def resize(self) -> None:
        """Rank 0's terminal gets the size that the console has now."""
        for terminal in self._terminals:
            size = fcntl.ioctl(1, termios.TIOCGWINSZ, b"\0" * 8)  # four unsigned shorts
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)

    def close(self) -> None:
        """Take what has been written, then stop. The workers have ended."""
        os.close(self._wake_writer)
        if self._thread.is_alive():
            self._thread.join()
        for log in self.logs.values():
            log.close()
        self._selector.close()
        for descriptor in self._descriptors:
            os.close(descriptor)

    def _channels(self, rank: int) -> tuple[int, int]:
        """File descriptors for a rank's stdout and stderr; what is written there reaches `_pump`."""
        if rank != 0:
            writer = self._pipe(rank, None)
            return writer, writer
        if os.isatty(1) and os.isatty(2) and _terminals_are_safe():
            terminal = self._terminal(rank)
            return terminal, terminal
        return self._pipe(rank, 1), self._pipe(rank, 2)

    def _pipe(self, rank: int, console: int | None) -> int:
        reader, writer = os.pipe()
        self._descriptors += reader, writer
        self._selector.register(reader, selectors.EVENT_READ, (rank, console))
        return writer

    def _terminal(self, rank: int) -> int:
        reader, writer = pty.openpty()
        self._descriptors += reader, writer
        tty.setraw(writer)  # the console's own terminal turns "\n" into "\r\n"; once is enough
        self._selector.register(reader, selectors.EVENT_READ, (rank, 1))
        self._terminals.append(writer)
        self.resize()
        return writer

    def _pump(self) -> None:
        closing = False
        while True:
            ready = self._selector.select(0 if closing else None)
            if closing and not ready:
                for console, rest in self._held.items():
                    self._show(console, masked(rest, self.mask))
                return
            for key, _ in ready:
                if key.fd == self._wake_reader:
                    closing = True
                    self._selector.unregister(self._wake_reader)
                    continue
                data = os.read(key.fd, 65536)
                rank, console = key.data
                self.logs[rank].write(data)
                if console is not None:
                    self._show(console, masked(self._whole(console, data), self.mask))

    def _whole(self, console: int, data: bytes) -> bytes:
        """Whole lines, so that no secret is cut in two; a terminal's live line cannot wait for its end."""
        if self._terminals:
            return data
        data = self._held.get(console, b"") + data
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        self._held[console] = data[end:]
        return data[:end]

    def _show(self, console: int, data: bytes) -> None:
        while data and console not in self._closed_consoles:
            try:
                data = data[os.write(console, data) :]
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # the reader has gone, as in `... | head`; training goes on, into the log
                self._closed_consoles.add(console)


def _terminals_are_safe() -> bool:
    """A session leader that has no terminal would be given the first one it opens, and its hang-up."""
    if os.getsid(0) != os.getpid():
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True
