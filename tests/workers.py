"""Runs a plain function on N real processes and brings the failing rank's traceback to pytest.

    def adds(world, number):
        return world.sum([number])

    assert workers.run(2, adds, 1.5) == [[3.0], [3.0]]

The function must sit at the top of its module; it gets this rank's `World` first; each rank's
result comes back in rank order. Processes are kept per world size for the whole session, so only
the first test of a size pays for starting them. After an error, a crash or a hang the processes of
that size are killed (ranks may wait for one another) and the next test gets new ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
_gangs: dict[int, Gang] = {}


class WorkerError(AssertionError):
    """A rank raised, died or did not answer in time. The message holds its traceback."""


def run(
    size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60, **kwargs: Any
) -> list[Any]:
    """`function(world, *args, **kwargs)` on `size` processes; the results in rank order.

    `args`, `kwargs` and results are pickled. Raises WorkerError.
    """
    if size not in _gangs:
        _gangs[size] = Gang(size)
    try:
        return _gangs[size].run(function, args, kwargs, timeout_s)
    except WorkerError:
        _gangs.pop(size).kill()
        raise


def stop() -> None:
    """Ends all processes. Called once, at the end of the session."""
    while _gangs:
        _gangs.popitem()[1].kill()


class Gang:
    """`size` processes that are joined in one world and wait for functions to run."""

    def __init__(self, size: int) -> None:
        from framework.strategy.world import host_store

        # fork from a process that has imported torch and done nothing else: starts in 0.1 s a rank
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor"])
        self.store = host_store(LOOPBACK, 0, timeout=timedelta(seconds=60))
        self.stacks = tempfile.TemporaryDirectory()
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": LOOPBACK,
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            process = context.Process(
                target=_serve, args=(theirs, environment, self._stack_file(rank)), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, args: tuple, kwargs: dict, timeout_s: float) -> list[Any]:
        for connection in self.connections:
            # one that died since the last test breaks the pipe; `recv` below reports it
            with contextlib.suppress(BrokenPipeError):
                connection.send((list(sys.path), function.__module__, function.__qualname__, args, kwargs))
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout_s
        waiting = dict(enumerate(self.connections))
        while waiting and (ready := wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))):
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                connection = waiting.pop(rank)
                try:
                    good, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(5)
                    good, value = False, f"process died, exit code {self.processes[rank].exitcode}"
                if good:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank} of {len(self.processes)}: {value}")
                    # the others may wait for this one in vain: what they say in two seconds is enough
                    deadline = min(deadline, time.monotonic() + 2)
        if waiting and not failures:
            failures = [
                f"rank {rank} of {len(self.processes)} did not answer in {timeout_s} s:\n{self._stack(rank)}"
                for rank in waiting
            ]
        if failures:
            raise WorkerError(f"{function.__qualname__} failed\n\n" + "\n\n".join(failures))
        return [results[rank] for rank in range(len(self.processes))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.join()
            connection.close()
        self.stacks.cleanup()

    def _stack_file(self, rank: int) -> str:
        return str(Path(self.stacks.name) / str(rank))

    def _stack(self, rank: int) -> str:
        """Where a silent rank is: its Python stack."""
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.3)
        return Path(self._stack_file(rank)).read_text()


def _serve(connection: Connection, environment: dict[str, str], stack_file: str) -> None:
    """What a process of a gang does: join, then run what comes until the pipe closes."""
    os.environ.update(environment)
    import torch

    from framework.strategy.world import connect

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's to handle; it closes the pipe
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: collecting after a test need not look at it
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        world = connect("cpu", timeout_s=60)
        while True:
            try:
                paths, module, name, args, kwargs = connection.recv()
            except EOFError:
                return
            sys.path[:] = paths
            try:
                connection.send(
                    (True, getattr(importlib.import_module(module), name)(world, *args, **kwargs))
                )
            except BaseException:
                connection.send((False, "\n" + traceback.format_exc()))
            gc.collect()  # engines hold hooks in cycles; the next test starts without them
