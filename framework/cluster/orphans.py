"""Ends every process of a gang, also when the launcher was killed and can end nothing itself.

Every worker carries its gang's word in its environment, and so does whatever it starts, in whatever
session. This file runs as a small process of its own beside the launcher, with nothing imported:
when the pipe to its standard input closes, for whatever reason, it ends all that carry the word.
"""

from __future__ import annotations

import os
import signal
import sys
import time

PATIENCE_S = 5.0  # how long new processes of a dying gang are looked for


def bearing(mark: str) -> list[int]:
    """Process ids of all processes that started with `mark` (NAME=VALUE) in their environment."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if mark.encode() in file.read().split(b"\0"):
                        found.append(int(entry))
            except OSError:  # it ended while we looked, or is another user's
                continue
    return found


def sweep(mark: str) -> None:
    """Ends with SIGKILL all processes that carry `mark`, again until none is left."""
    deadline = time.monotonic() + PATIENCE_S
    while (left := bearing(mark)) and time.monotonic() < deadline:
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the launcher
    sys.stdin.buffer.read()
    sweep(sys.argv[1])
