"""A run's directory as the launcher sees it: whose it is now, and how the last start ended.

Knows nothing of configurations; two of them are compared as plain trees.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from framework.errors import ConfigError

CONFIG, RESULT, LOGS = "config.yaml", "result.json", "logs"


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """This process alone trains in `directory`, made if need be, until the block is left or it dies.

    A directory that is still empty at the end is removed. Raises ConfigError naming the owner when
    another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ConfigError(
                f"run_dir: {directory} is being trained in by {owner}; wait for it, stop it, "
                "or give this run its own: run_dir=OTHER"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its owner removed it while we opened it
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):  # not empty
            directory.rmdir()


def wait_for(directory: Path, patience_s: float) -> bool:
    """Wait until no process trains in `directory`; False when one still does after that many seconds.

    Not for the process that holds it: to look would be to let go.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with (directory / "lock").open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except FileNotFoundError:
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def result(directory: Path) -> dict[str, Any] | None:
    """What `result.json` says, None where there is none."""
    try:
        found: dict[str, Any] = json.loads((directory / RESULT).read_text())
    except FileNotFoundError:
        return None
    return found


def write_result(directory: Path, value: Mapping[str, Any]) -> None:
    """Write `result.json`, whole or not at all."""
    temporary = directory / f".{RESULT}"
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(directory / RESULT)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines such as `optim.lr: 1e-05 -> 2e-05` for all leaves that differ between two trees."""
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    absent = object()

    def shown(value: object) -> str:
        return "absent" if value is absent else json.dumps(value)

    return [
        f"{key}: {shown(old.get(key, absent))} -> {shown(new.get(key, absent))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value
