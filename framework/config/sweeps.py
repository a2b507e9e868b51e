"""A sweep from its command to its end: one process keeps it, Hydra starts the jobs, a page shows them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra

from framework.cluster import devices, directory, records, worker
from framework.cluster.keeper import Keeper
from framework.config import compose, jobs, secrets
from framework.config.compose import Command
from framework.errors import DONE, INTERRUPTED, REFUSED, ConfigError, UserError

RETRY = "--retry-failed"
"""Beside -m: jobs that have failed are tried again. Without it the record of their failure stands."""

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


def settings(arguments: Sequence[str]) -> list[str]:
    """The arguments that are Hydra's. Raises ConfigError for a retry where there is no sweep."""
    typed = [argument for argument in arguments if argument != RETRY]
    if len(typed) < len(arguments) and not compose.command(typed).multirun:
        raise ConfigError(f"{RETRY}: found without -m; expected a sweep; leave it out")
    return typed


def keep(arguments: Sequence[str], *, program: Sequence[str]) -> int:
    """Carry out a sweep whose command line was checked. Returns the exit status: 0 where every job is done.

    `program` are python's arguments for one job, before the file that says which. In a process of its own:
    its signals are this one's from here on.
    """
    try:
        return _keep(compose.command(settings(arguments)), program, retry=RETRY in arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def _keep(asked: Command, program: Sequence[str], *, retry: bool) -> int:
    overrides = asked.overrides
    launcher = compose.launcher(asked)
    given = [text for text in overrides if text.startswith("hydra.sweep.dir=")]
    where = Path(given[-1].partition("=")[2].strip("'")) if given else compose.sweep_dir(overrides)
    where = where.expanduser().absolute()
    flags = [] if asked.config_dir is None else [f"--config-dir={asked.config_dir}"]
    flags += [] if asked.config_name == "train" else [f"--config-name={asked.config_name}"]
    with directory.held(where), Keeper(where) as keeper:
        sweep = jobs.Sweep(
            directory=where,
            program=tuple(program),
            flags=tuple(flags),
            ties=keeper.ties,
            retry=retry,
            devices=devices.present(os.environ) if launcher != BASIC else (),
            threads=os.environ.get("OMP_NUM_THREADS"),
        )
        told = {
            "status": "running",
            "command": compose.line(["-m", *flags, *(secrets.typed(text) for text in overrides)]),
            "directory": os.getcwd(),
        }
        records.update(where / records.SWEEP, told)
        _importable()
        try:
            _through(
                jobs.Task(sweep), [*overrides, *([] if given else [f"hydra.sweep.dir='{where}'"])], flags
            )
        finally:
            stopped = keeper.ties.asked() > 0
            status = _close(where, stopped)
    return status


def _through(task: Callable[..., object], overrides: Sequence[str], flags: Sequence[str]) -> None:
    """Let Hydra start the jobs; a sweeper of ours comes back, or raises SystemExit where it was stopped."""
    typed = sys.argv[1:]
    sys.argv[1:] = [*overrides, *flags, "-m"]  # Hydra does not read settings on both sides of a flag
    try:
        hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="train")(task)()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
    finally:
        sys.argv[1:] = typed


def _close(where: Path, stopped: bool) -> int:
    """Say what became of the jobs, on the console and on the page. Returns the exit status."""
    found = records.every(where)
    counts: dict[str, int] = {}
    for job in found:
        counts[job["status"]] = counts.get(job["status"], 0) + 1
    bad = [job for job in found if job["status"] in (records.FAILED, records.REFUSED, records.KILLED)]
    for job in bad:
        print(f"job {job.get('number', '')} {job['status']}: {_said(job)}", file=sys.stderr)
    open_ = any(job["status"] in (records.QUEUED, records.RUNNING, records.INTERRUPTED) for job in found)
    word = "interrupted" if stopped or open_ else "failed" if bad else "done"
    records.update(where / records.SWEEP, {"status": word})
    print(f"{counts.get(records.DONE, 0)} of {len(found)} runs done: {jobs.show(where)}", file=sys.stderr)
    if stopped or open_:
        return INTERRUPTED
    if not bad:
        return DONE
    return REFUSED if all(job["status"] == records.REFUSED for job in bad) else worker.FAILED


def _said(job: records.Record) -> str:
    """The last line of a job's error."""
    return ((job.get("error") or "").strip().splitlines() or ["without a word"])[-1]


def _importable() -> None:
    """Jobs in processes of a pool or a queue find `framework` where this process has it from."""
    root = str(compose.CONF.parent)
    known = os.environ.get("PYTHONPATH", "")
    if root not in known.split(os.pathsep):
        os.environ["PYTHONPATH"] = f"{known}{known and os.pathsep}{root}"
