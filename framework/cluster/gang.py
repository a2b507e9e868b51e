"""One job is one gang: the workers of this machine, started, watched and ended by torch-elastic.

Elastic brings rendezvous over machines, restarts and the variables that every library knows. This
file adds what it leaves open: the store listens on one address only; a stop reaches the workers
alone, which save and leave; a failed rank is named once; nothing outlives the launcher.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server import Worker, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from framework.cluster import environ, orphans
from framework.cluster.machines import Alone, Machines
from framework.cluster.output import Output
from framework.cluster.worker import WorkerFailed
from framework.errors import REFUSED
from framework.strategy.world import host_store

LOOPBACK = "127.0.0.1"
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FORWARD = (signal.SIGUSR1, signal.SIGUSR2)
FAILURE_GRACE_S = 5.0  # for the other ranks, once one has failed: there is nothing left to save
SHORT = 20  # lines of a traceback that are shown; the log holds all


def launch(
    command: Sequence[str],
    *,
    nproc: int,
    log_dir: Path,
    machines: Machines | Alone | None = None,
    run_id: str = "sapwood",
    threads: int | None = None,
    grace_s: float = 60.0,
    timeout_s: float = 600.0,
    max_restarts: int = 0,
    environment: dict[str, str] | None = None,
    mask: Callable[[str], str] = str,
) -> signal.Signals | None:
    """Run `command` in `nproc` processes on this machine and wait until all have left.

    The processes find RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and the rest as torchrun sets them,
    and `environment` besides. On several `machines` each calls this with the same `run_id`; on one, a
    free port on loopback is taken. OMP_NUM_THREADS becomes `threads`; when that is None it keeps the value
    it has, or becomes the cores of this machine divided by `nproc`. Ranks log to `log_dir`/rank-N.log;
    `mask` hides secrets in what they say.

    A first SIGINT, SIGTERM or SIGHUP goes on to the workers, which have `grace_s` seconds to save and
    leave; a second one ends them at once. SIGUSR1 and SIGUSR2 go on to the workers. Returns the signal
    that stopped the gang, None where the workers ended by themselves. Call it from the main thread.

    After a failure the gang is started again up to `max_restarts` times, `timeout_s` bounding the wait
    for other machines; then WorkerFailed is raised. A refusal (status 2) or a stop is never retried.
    Raises MachineLost, with the workers ended, where another machine failed or is not heard of any more.
    """
    word = uuid.uuid4().hex
    variables = {environ.GANG: word, "PYTHONUNBUFFERED": "1", **(environment or {})}
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        variables["OMP_NUM_THREADS"] = str(threads or max(1, cores // nproc))
    elastic = logging.getLogger("torch.distributed.elastic")  # says at length what is said here briefly
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False

    machines = machines or Alone()
    rendezvous = _Rendezvous(machines, run_id, int(timeout_s))
    spec = WorkerSpec(
        role="rank",
        local_world_size=nproc,
        rdzv_handler=rendezvous,
        entrypoint=command[0],
        args=tuple(command[1:]),
        max_restarts=max_restarts,
        monitor_interval=0.1,
    )
    mark = f"{environ.GANG}={word}"
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", orphans.__file__, mark], stdin=subprocess.PIPE, start_new_session=True
    )
    with tempfile.TemporaryDirectory(prefix="sapwood-") as failures:
        output = Output(log_dir, Path(failures), variables, mask=mask)
        agent = Agent(spec, output, machines, mark=mark, grace_s=grace_s)
        handlers = {number: signal.getsignal(number) for number in (*STOP, *FORWARD, signal.SIGWINCH)}
        try:
            result = agent.run()
        except SignalException as stop:  # in the moment before our own handlers stood
            return signal.Signals(stop.sigval)
        finally:
            guard.communicate()  # closes its pipe, so that it ends what is left, and waits for it
            output.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if agent.stopped_by is None and result.is_failed():
        assert agent.failure is not None
        raise WorkerFailed(agent.failure.report(), rank=agent.failure.rank, status=agent.failure.status)
    return agent.stopped_by


@dataclass(frozen=True)
class Failure:
    """How a rank ended that should not have."""

    rank: int
    process: int
    status: int  # exit status, -N for signal N
    said: str  # its own words: a traceback or a refusal; empty where it could not speak
    log: Path
    last_lines: tuple[str, ...]  # of its log
    when: float  # seconds since the epoch

    def report(self) -> str:
        """For the console: short, with the place where the rest is."""
        if self.status == REFUSED and self.said:
            return self.said
        how = f"failed with exit status {self.status}"
        if self.status < 0:
            how = f"was ended by {_signal_name(-self.status)}"
            if self.status == -signal.SIGKILL:
                how += " (is the machine short of memory? `dmesg` tells)"
        lines = self.said.splitlines() or (list(self.last_lines) if self.rank != 0 else [])
        if len(lines) > SHORT:
            lines = [lines[0], "  ...", *lines[2 - SHORT :]]
        return "\n".join([*lines, f"error: rank {self.rank} (process {self.process}) {how}; see {self.log}"])


class Agent(LocalElasticAgent):
    """Elastic's agent of one machine, with our manners when a gang is stopped or fails."""

    def __init__(
        self, spec: WorkerSpec, output: Output, machines: Machines | Alone, *, mark: str, grace_s: float
    ) -> None:
        super().__init__(spec, logs_specs=output)
        self._machines = machines
        self.stopped_by: signal.Signals | None = None
        self.failure: Failure | None = None  # the first of the last attempt
        self._output = output
        self._mark = mark
        self._grace_s = grace_s
        self._deadline = 0.0  # monotonic seconds, of a stop

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.failure = None
        processes = super()._start_workers(worker_group)
        for number in STOP:  # elastic has just put its own here, which send signals to whole sessions:
            signal.signal(number, self._stop)  # helpers of a worker would die before it can save
        for number in FORWARD:
            signal.signal(number, self._forward)
        signal.signal(signal.SIGWINCH, lambda *_: self._output.resize())
        return processes

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self.stopped_by is not None and time.monotonic() > self._deadline:
            print(f"not stopped after {self._grace_s:g} s: ended by force", file=sys.stderr)
            orphans.sweep(self._mark)
        failures = [failure for worker in worker_group.workers if (failure := self._failure(worker))]
        if failures and self.failure is None:
            # found within the same tenth of a second: who was killed cannot have been the consequence
            self.failure = min(failures, key=lambda failure: (failure.status > 0, failure.when))
            self._end(worker_group.workers)
            for worker in worker_group.workers:
                failure = self._failure(worker)
                if failure is not None and failure.said:
                    self._output.logs[failure.rank].note(failure.said)
            if self.stopped_by is not None or self.failure.status == REFUSED:
                self._remaining_restarts = 0
            if self._remaining_restarts > 0:
                print(f"{self.failure.report()}\nstarting all ranks again", file=sys.stderr)
            else:
                if missing := self._machines.silent():
                    print(missing, file=sys.stderr)
                self._machines.fail(self.failure.report())
        if self.failure is None:
            self._machines.check()  # else this machine has enough of its own to tell
        return super()._monitor_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Nothing: the launchers agree on how a run has ended, and wait for one another then."""

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Called when the workers have left, or failed, or when there is nothing yet to save."""
        super()._shutdown(signal.SIGKILL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            print("\nended by force", file=sys.stderr)
            orphans.sweep(self._mark)
            return
        self.stopped_by = signal.Signals(number)
        self._deadline = time.monotonic() + self._grace_s
        print(
            f"\n{self.stopped_by.name}: saving after this step (at most {self._grace_s:g} s); "
            "once more to end at once",
            file=sys.stderr,
        )
        # a worker knows two ways to be asked; a lost terminal is asked for like the other
        self._send(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.Signals(number))

    def _send(self, number: signal.Signals) -> None:
        for worker in self._worker_group.workers:
            if _ended(worker) is None:
                os.kill(worker.id, number)

    def _end(self, workers: Sequence[Worker]) -> None:
        """Let the ranks that are left end: soon, for they may wait for the failed one for ever."""
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + FAILURE_GRACE_S
        while any(_ended(worker) is None for worker in workers):
            if time.monotonic() > deadline:
                orphans.sweep(self._mark)
            time.sleep(0.02)

    def _failure(self, worker: Worker) -> Failure | None:
        status = _ended(worker)
        if not status:
            return None
        rank = worker.global_rank
        log = self._output.logs[rank]
        file = self._output.failure_file(rank)
        said, when = "", time.time()
        if file.exists():
            said, when = json.loads(file.read_text())["message"]["message"], file.stat().st_mtime
            said = self._output.mask(said)
        return Failure(rank, worker.id, status, said, log.path, tuple(log.tail), when)


class _Rendezvous(StaticTCPRendezvous):
    """Machines that know each other's ranks, met in a store that listens on one address only."""

    def __init__(self, machines: Machines | Alone, run_id: str, timeout_s: int) -> None:
        store = machines.store or host_store(LOOPBACK, 0, timeout=timedelta(seconds=timeout_s))
        super().__init__(store.host, store.port, machines.rank, machines.count, run_id, timeout_s)
        self._store = store


def _ended(worker: Worker) -> int | None:
    """Exit status of a worker's process, -N for signal N, None while it runs. Leaves it to be reaped.

    A worker that elastic has reaped already counts as 0: it reaps failed ones only when all ended.
    """
    try:
        end = os.waitid(os.P_PID, worker.id, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return 0
    if end is None:
        return None
    return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
