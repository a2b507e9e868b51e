"""Processes of one world that run one function after another, and bring back a failing rank's traceback.

    crew = Crew(2)
    crew.run(adds, 1.5)  # adds(world, 1.5) on both; results in rank order

The function must sit at the top of its module. Starting a world costs more than most work in it, so the
processes are kept until `kill`. After an error, a crash or a hang a crew is of no more use: ranks may wait
for one another.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from framework.errors import SapwoodError

LOOPBACK = "127.0.0.1"
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class CrewError(SapwoodError):
    """A rank raised, died or did not answer in time. The message holds its traceback."""


class Crew:
    """`size` processes that are joined in one world and wait for functions to run."""

    def __init__(
        self, size: int, *, device: str = "cpu", silence_s: float = 60, preload: Sequence[str] = ()
    ) -> None:
        """`silence_s` bounds every wait of one rank for another.

        `preload` are modules that all functions need. They are imported once for all crews of this process,
        of which the first decides; by each rank itself where there is a GPU, which cannot be handed on by a
        process that has looked at it.
        """
        import torch

        from framework.strategy.world import host_store

        # fork from a process that has imported these and done nothing else: starts in 0.1 s a rank
        context = multiprocessing.get_context("forkserver")
        modules = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor"]
        context.set_forkserver_preload(modules + ([] if torch.cuda.is_available() else list(preload)))
        with _environment(QUIET):  # some modules read it when they are imported
            forkserver.ensure_running()
        self.store = host_store(LOOPBACK, 0, timeout=timedelta(seconds=60))
        self.stacks = tempfile.TemporaryDirectory()
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            environment = QUIET | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": LOOPBACK,
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            process = context.Process(
                target=_serve,
                args=(theirs, environment, self._stack_file(rank), device, silence_s),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = 60, **kwargs: Any
    ) -> list[Any]:
        """`function(world, *args, **kwargs)` on every process; the results in rank order.

        Arguments and results are pickled. Raises CrewError.
        """
        for connection in self.connections:
            # one that died since the last call breaks the pipe; `recv` below reports it
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
                    died = f"process died, exit code {self.processes[rank].exitcode}"
                    good, value = False, f"{died}\n{self._written(rank)}".rstrip()
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
            raise CrewError(f"{function.__qualname__} failed\n\n" + "\n\n".join(failures))
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
        os.kill(self.processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.3)
        return self._written(rank)

    def _written(self, rank: int) -> str:
        """The Python stacks that a rank has left, asked for or at a crash in native code."""
        return Path(self._stack_file(rank)).read_text()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that a process started inside has."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(
    connection: Connection, environment: dict[str, str], stack_file: str, device: str, silence_s: float
) -> None:
    """What a process of a crew does: join, then run what comes until the pipe closes."""
    os.environ.update(environment)
    import torch

    from framework.strategy.world import connect

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle; it closes the pipe
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: collecting after a call need not look at it
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        faulthandler.enable(file=stacks)
        world = connect(device, timeout_s=silence_s)
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
            gc.collect()  # engines hold hooks in cycles; the next call starts without them
