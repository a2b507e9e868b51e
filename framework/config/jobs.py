"""One job of a sweep: the task function that Hydra's launchers run, here, in a pool or in a queue.

A job is `launch/train.py --job FILE` in processes of its own, so that one which is killed takes nothing else
with it. Whatever becomes of it is written into its record; nothing is raised that would end the other jobs.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from framework.cluster import devices, directory, records, schedulers
from framework.cluster.child import FORWARD, Children
from framework.cluster.keeper import Ties
from framework.cluster.records import Record
from framework.config import compose, record, secrets
from framework.config.schema import Run, digest
from framework.errors import DONE, INTERRUPTED, REFUSED, UserError
from framework.track import sweep as page

OUTCOME = "outcome.json"  # where a job says how it ended, beside the file it was started with
LEAVING_S = 90.0
"""How long an earlier start of a job may take to save and leave; launch.grace_s is 60 as a rule."""

KILLS = (signal.SIGKILL, signal.SIGTERM)
"""Signals that come from outside: short memory, a queue, a person. Others are the program's own fault."""


@dataclass(frozen=True)
class Sweep:
    """One call of a sweep's command, as its jobs know it wherever they run. Plain data, to be pickled."""

    directory: Path
    program: tuple[str, ...]  # python's arguments for a job; the path of a file comes after them
    flags: tuple[str, ...]  # of the command line, besides settings
    ties: Ties
    retry: bool  # what has failed is tried again
    devices: tuple[str, ...]  # of the keeper's host, to be divided; empty where one job runs at a time
    threads: str | None  # OMP_NUM_THREADS where the user has chosen one

    def command(self, overrides: Sequence[str]) -> str:
        """What repeats a job by itself, as a person would type it."""
        return compose.line([secrets.typed(text) for text in (*self.flags, *overrides)])


def name(overrides: Sequence[str]) -> str:
    """What the record of a job is called: the same for the same settings, however they are watched."""
    telling = sorted(text for text in overrides if not text.lstrip("+~").startswith(("tracker", "hydra")))
    return digest({"overrides": telling})


class Task:
    """What Hydra calls for each job, with its composed configuration; in whatever process that is."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def __call__(self, config: DictConfig) -> float | None:
        """The job's objective, None for one that has none. Raises SystemExit where a stop ends the sweep."""
        with ExitStack() as stack:
            hydra: Any = HydraConfig.get()
            overrides = compose.as_typed(hydra)
            node = None if self.sweep.ties.together else schedulers.node(os.environ)
            file = records.path(self.sweep.directory, name(overrides))
            if node is not None and node.rank > 0:  # machine 0 of the job keeps its record
                file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sapwood-")), file.name)
            if not self.sweep.ties.asked():
                now = records.update(file, self._begun(overrides))
                try:
                    now = self._run(file, now, placed(compose.composed(config), node), hydra)
                except UserError as error:
                    self._say(now, f"error: {error}")
                    now = records.update(file, ended(records.REFUSED, error=str(error), exit_status=REFUSED))
                if self.sweep.ties.here:
                    show(self.sweep.directory)
                if now["status"] == records.DONE:
                    return page.value(directory.result(Path(now["run_dir"])) or {}, None)
        if self.sweep.ties.gone:
            os._exit(INTERRUPTED)  # a worker of a pool that nobody waits for
        if self.sweep.ties.here and self.sweep.ties.asked():
            raise SystemExit(INTERRUPTED)  # not an Exception: after one the next job would start
        return None

    def _begun(self, overrides: Sequence[str]) -> Record:
        return {
            "status": records.RUNNING,
            "overrides": [secrets.typed(text) for text in overrides],
            "command": self.sweep.command(overrides),
            "host": self.sweep.ties.host if self.sweep.ties.together else os.uname().nodename,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "error": None,
            "exit_status": None,
        }

    def _run(self, file: Path, now: Record, run: Run, hydra: Any) -> Record:
        """Train unless that was done before. Returns the record as it stands then."""
        where = Path(run.run_dir)
        now = records.update(file, {"run_dir": run.run_dir})
        if (directory.result(where) or {}).get("status") == "done":
            return records.update(file, ended(records.DONE))
        pool = self.sweep.devices if self.sweep.ties.together and run.launch.device != "cpu" else ()
        asked = self.sweep.ties.asked
        with ExitStack() as stack:
            lease = stack.enter_context(devices.leased(pool, run.launch.nproc, stopped=asked))
            if lease is None:
                return records.update(file, ended(records.QUEUED))
            self._say(now, "starts" + (f" on {','.join(lease.devices)}" if lease.devices else ""))
            now = records.update(file, {"devices": list(lease.devices)})
            output = None
            if not self.sweep.ties.here:  # several at once would write over one another
                output = stack.enter_context(file.with_suffix(".log").open("ab"))
                records.update(file, {"log": str(file.with_suffix(".log"))})
            directory.wait_for(where, LEAVING_S)
            hopeless = _pruner(self.sweep.directory, now, where, hydra)
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sapwood-")))
            handed = temporary / "run.json"
            handed.write_text(record.packed(run))
            preempted = _preemption()
            with Children(self._signals(preempted)) as children:
                began = time.monotonic()
                status = children.run(
                    [sys.executable, *self.sweep.program, str(handed)],
                    environment={**os.environ, **self._threads(run, hydra), **lease.variables},
                    output=output,
                    inherited=lease.locks,
                    asked=lambda: max(asked(), int(hopeless())),
                )
            said = records.read(temporary / OUTCOME)
            changes = verdict(status, said, pruned=hopeless(), stopped=bool(asked() or children.stopped))
            changes["seconds"] = round(time.monotonic() - began, 3)
            now = records.update(file, changes)
        self._say(now, _words(now))
        if preempted is not None and children.stopped is not None and not asked():
            _requeue(preempted, children.stopped)
        return now

    def _signals(self, preempted: Callable[..., Any] | None) -> dict[signal.Signals, signal.Signals]:
        """What this process gets and passes on: the keeper's own stops are written down, not passed on."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        if self.sweep.ties.here:
            return {signal.SIGUSR2: signal.SIGUSR2}
        passed = {number: number for number in FORWARD}
        if preempted is not None:
            passed |= {number: signal.SIGTERM for number in FORWARD if signal.getsignal(number) == preempted}
        return passed

    def _threads(self, run: Run, hydra: Any) -> dict[str, str]:
        """CPU threads of each process, where several jobs share a host and nobody has chosen."""
        at_once = hydra.launcher.get("n_jobs") or 1
        cores = len(os.sched_getaffinity(0))
        at_once = at_once if at_once > 0 else max(1, cores + 1 + at_once)
        at_once = min(at_once, hydra.sweeper.get("n_jobs") or at_once)
        if self.sweep.threads is not None:
            return {"OMP_NUM_THREADS": self.sweep.threads}
        if at_once == 1 or not self.sweep.ties.together:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, cores // (at_once * run.launch.nproc)))}

    def _say(self, now: Mapping[str, Any], text: str) -> None:
        varied = " ".join(f"{key}={value}" for key, value in now.get("varied", {}).items())
        print(f"job {now.get('number', '')} {varied}: {text}", file=sys.stderr, flush=True)


def placed(run: Run, node: schedulers.Node | None) -> Run:
    """The run as one of the machines that a queue has given to its job."""
    if node is None or node.count == 1:
        return run
    place = {
        "nnodes": node.count,
        "node_rank": node.rank,
        "master_addr": node.master_addr,
        "master_port": node.master_port,
    }
    return run.model_copy(update={"launch": run.launch.model_copy(update=place)})


def show(sweep: Path) -> Path:
    """Write the sweep's page as things stand; its path."""
    return page.build(sweep, records.read(sweep / records.SWEEP), records.every(sweep))


def ended(status: str, *, error: str | None = None, exit_status: int | None = None) -> Record:
    """The changes of a record whose job does not run, or runs no more."""
    return {
        "status": status,
        "error": None if error is None else secrets.hidden(error),
        "exit_status": exit_status,
    }


def verdict(status: int, said: Mapping[str, Any], *, pruned: bool, stopped: bool) -> Record:
    """What the exit status of a job and its last words come to.

    A rank or a launcher that was killed says nothing about the job's settings: the job is done again when the
    sweep is started again. One that failed by itself stays failed until a retry is asked for.
    """
    error = said.get("error")
    if status == DONE:
        return ended(records.DONE)
    if status == REFUSED:
        return ended(records.REFUSED, error=error, exit_status=REFUSED)
    if not said:
        words = f"the job's launcher was ended by signal {status - 128}"
        return (
            ended(records.INTERRUPTED) if stopped else ended(records.KILLED, error=words, exit_status=status)
        )
    if status == INTERRUPTED or status > 128:
        return ended(records.PRUNED if pruned else records.INTERRUPTED)
    if said.get("ended_by") in KILLS:
        return ended(records.KILLED, error=error, exit_status=status)
    return ended(records.FAILED, error=error, exit_status=status)


def _words(now: Mapping[str, Any]) -> str:
    """How a job ended, in a few words; the console or its log has the rest."""
    if now["status"] == records.DONE:
        objective = page.value(directory.result(Path(now["run_dir"])) or {}, None)
        return "done" if objective is None else f"done, {objective:.6g}"
    again = {
        records.KILLED: "; the same command tries it again",
        records.INTERRUPTED: "; the same command goes on",
        records.FAILED: "; --retry-failed tries it again",
    }
    return f"{now['status']}{again.get(now['status'], '')}"


def _pruner(sweep: Path, now: Mapping[str, Any], where: Path, hydra: Any) -> Callable[[], bool]:
    """Whether the job is a trial without hope, asked again and again while it runs."""
    if "trial" not in now or not hydra.sweeper.get("pruner"):
        return lambda: False
    from framework.config.search import Pruner

    return Pruner(sweep, hydra.sweeper, trial=now["trial"], metrics=where / "metrics.jsonl").hopeless


def _preemption() -> Callable[..., Any] | None:
    """What submitit, whose queue this process belongs to, wants done when the job has to make room."""
    for number in (signal.SIGUSR2, signal.SIGUSR1):
        handler = signal.getsignal(number)
        if callable(handler) and getattr(handler, "__module__", "").startswith("submitit."):
            return handler
    return None


def _requeue(preempted: Callable[..., Any], number: signal.Signals) -> None:
    """The job has saved. submitit puts it back into the queue and ends this process, or says why not."""
    if signal.getsignal(number) != preempted:
        return  # told to end for good
    try:
        preempted(number, None)
    except Exception as error:
        print(error, file=sys.stderr)
