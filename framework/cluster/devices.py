"""The devices of one host, divided among jobs that run at the same time.

A device is held by a lock on a file that the job's processes keep open, so it is free again the moment the
last of them ends, however it ends. The files lie in a directory of the user's on this host: sweeps that were
started apart from one another share its devices, too.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from framework.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
WAIT_S = 0.2  # between two looks for a free device


@dataclass(frozen=True)
class Lease:
    """Devices that nobody else has meanwhile."""

    devices: tuple[str, ...]
    locks: tuple[int, ...]  # file descriptors; a process that inherits them holds the devices as well

    @property
    def variables(self) -> dict[str, str]:
        """What a process has to be told to use them alone."""
        return {VISIBLE: ",".join(self.devices)} if self.devices else {}


def present(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The devices a process of this environment may use, as CUDA_VISIBLE_DEVICES names them."""
    if VISIBLE in environment:
        named = (name.strip() for name in environment[VISIBLE].split(","))
        return tuple(dict.fromkeys(name for name in named if name and name != "-1"))
    from torch import cuda  # takes seconds

    return tuple(map(str, range(cuda.device_count())))


@contextmanager
def leased(
    pool: Sequence[str],
    count: int,
    *,
    stopped: Callable[[], object] = lambda: False,
    place: Path | None = None,
) -> Iterator[Lease | None]:
    """`count` devices of `pool` for the time of the block, waiting until so many are free at once.

    None when `stopped` said yes while it waited. An empty pool gives an empty lease: there is nothing to
    divide. `place` is where the locks are kept. Raises ConfigError where the pool is too small.
    """
    if pool and count > len(pool):
        raise ConfigError(
            f"launch.nproc: found {count} processes for the {len(pool)} devices of this host "
            f"({', '.join(pool)}); expected at most one each; type launch.nproc={len(pool)}"
        )
    place = place or _place()
    with ExitStack() as held:
        while pool:
            taken: dict[str, BinaryIO] = {}
            with _locked(place / "all", wait=True):  # so that two jobs do not each get half of theirs
                for device in pool:
                    file = _lock(place / device.replace("/", "_"), wait=False)
                    if file is not None:
                        taken[device] = file
                    if len(taken) == count:
                        break
                if len(taken) < count:
                    for file in taken.values():
                        file.close()
            if len(taken) == count:
                for file in taken.values():
                    held.enter_context(file)
                yield Lease(tuple(taken), tuple(file.fileno() for file in taken.values()))
                return
            if stopped():
                yield None
                return
            time.sleep(WAIT_S)
        yield Lease((), ())


def _place() -> Path:
    """A directory of this user's on this host; another in a SLURM allocation, which has its own devices."""
    owner = os.getuid()
    allocation = os.environ.get("SLURM_JOB_ID", "")
    path = Path(tempfile.gettempdir(), f"sapwood-devices-{owner}{allocation and '-'}{allocation}")
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != owner:
        raise ConfigError(f"{path}: belongs to somebody else; expected a directory of yours; set TMPDIR")
    return path


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    file = _lock(path, wait=wait)
    assert file is not None
    with file:
        yield


def _lock(path: Path, *, wait: bool) -> BinaryIO | None:
    """An open file with the lock on it, which goes with its last descriptor; None where another has it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file
