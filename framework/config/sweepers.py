"""Starting the jobs of a sweep: every combination of values here, what a search proposes in `config.search`.

Hydra's own sweeper starts all jobs anew each time, and ends with the first that its launcher loses. Ours read
the jobs' records: what is decided is not started again, and a lost job costs nobody else anything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from framework.cluster import directory, records
from framework.cluster.records import Record
from framework.config import secrets, space, sweeping
from framework.config.jobs import LEAVING_S, Task, ended, name, show
from framework.errors import INTERRUPTED, REFUSED, ConfigError, UserError


@dataclass(frozen=True)
class Job:
    """One set of settings to try."""

    number: int  # in the order of the sweep
    overrides: tuple[str, ...]
    varied: Mapping[str, str]  # those that tell it from the others
    trial: int | None = None  # of a study

    @property
    def name(self) -> str:
        return name(self.overrides)


class Kept(Sweeper):
    """What both sweepers share. Where a job stands is read from its record, not from what a launcher says."""

    config: DictConfig

    def __init__(self, **_: Any) -> None:
        """Settings are read in `sweep`, where a refusal can be told as one."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        assert isinstance(task_function, Task)
        self.task, self.config, self.hydra_context = task_function, config, hydra_context
        self.directory = task_function.sweep.directory
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Everything that is left to do. Raises SystemExit where it was refused or stopped."""
        try:
            self.work(arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(REFUSED) from error

    def work(self, arguments: list[str]) -> None:
        """What a sweeper does."""
        raise NotImplementedError

    def objectives(self, chosen: Sequence[sweeping.Objective] | None) -> list[dict[str, Any]]:
        """What is to be made best, as the page and the search read it."""
        if chosen is None:
            return [{"metric": self.config.evaluate.metric, "goal": self.config.evaluate.goal}]
        return [objective.model_dump() for objective in chosen]

    def describe(self, **facts: Any) -> None:
        """Write down what the page has to know of the sweep."""
        records.update(self.directory / records.SWEEP, facts)

    def look(self, job: Job) -> Record:
        """The record of a job as it stands."""
        return records.read(records.path(self.directory, job.name))

    def decided(self, job: Job) -> bool:
        """Whether an earlier start has come to a verdict on these settings."""
        found = self.look(job)
        if found.get("status") == records.DONE:  # unless its directory was removed since
            return (directory.result(Path(found["run_dir"])) or {}).get("status") == "done"
        failed = found.get("status") == records.FAILED
        return found.get("status") in records.FINAL and not (failed and self.task.sweep.retry)

    def start(self, jobs: Sequence[Job]) -> None:
        """Start these jobs; come back when all have ended, whatever became of them.

        Raises SystemExit where a stop was asked for, ConfigError where the launcher cannot start any.
        """
        for job in jobs:
            told: Record = {"number": job.number, "varied": _varied(job)}
            told["overrides"] = [secrets.typed(text) for text in job.overrides]
            told["command"] = self.task.sweep.command(job.overrides)
            if job.trial is not None:
                told["trial"] = job.trial
            records.update(records.path(self.directory, job.name), told | ended(records.QUEUED))
        left, broken = list(jobs), None
        while left and not self.task.sweep.ties.asked():
            try:
                with patient(self.launcher):
                    returned = self.launcher.launch([job.overrides for job in left], left[0].number)
                broken = None
            except Exception as error:  # a pool that lost a process gives up all of its jobs
                returned, broken = [], error
            for position, job in enumerate(left):
                self._settle(job, returned[position] if returned else None)
            show(self.directory)
            if broken is None:
                break
            states = (records.QUEUED, records.INTERRUPTED)
            again = [job for job in left if self.look(job)["status"] in states]
            if len(again) == len(left):
                raise ConfigError(f"hydra/launcher: {broken}") from broken
            lost = type(broken).__name__
            print(f"the launcher lost a process ({lost}); {len(again)} jobs start again", file=sys.stderr)
            left = again
        if self.task.sweep.ties.asked():
            raise SystemExit(INTERRUPTED)

    def _settle(self, job: Job, returned: JobReturn | None) -> None:
        """Complete the record of a job that could not do so itself."""
        file = records.path(self.directory, job.name)
        found = records.read(file)
        if returned is not None and returned.status == JobStatus.FAILED:
            said = secrets.hidden(repr(returned._return_value))
            records.update(file, ended(records.FAILED, error=said, exit_status=1))
        elif found["status"] == records.RUNNING:
            where = Path(found["run_dir"]) if "run_dir" in found else self.directory
            directory.wait_for(where, LEAVING_S)
            status = (directory.result(where) or {}).get("status")
            if status in (records.DONE, records.INTERRUPTED):
                records.update(file, ended(status))
            else:
                records.update(file, ended(records.KILLED, error="its process is gone", exit_status=1))


class Grid(Kept):
    """Every combination of the values that were typed and that a YAML file gives."""

    def work(self, arguments: list[str]) -> None:
        settings = sweeping.check(self.config.hydra)
        assert isinstance(settings, sweeping.Grid)
        lines = space.grid(arguments, settings.params or {})
        values = list(zip(*lines, strict=True))
        varied = [position for position, column in enumerate(values) if len(set(column)) > 1]
        jobs = [
            Job(number, line, dict(line[position].split("=", 1) for position in varied))
            for number, line in enumerate(lines)
        ]
        self.describe(objectives=self.objectives(None), jobs=[job.name for job in jobs], log=[])
        todo = [job for job in jobs if not self.decided(job)]
        if len(todo) < len(jobs):
            print(f"{len(jobs) - len(todo)} of {len(jobs)} jobs were done before", file=sys.stderr)
        self.start(todo)


def _varied(job: Job) -> dict[str, str]:
    """The settings that tell it from the others, as a page may show them."""
    return {key: secrets.typed(f"{key}={text}").partition("=")[2] for key, text in job.varied.items()}


@contextmanager
def patient(launcher: Launcher) -> Iterator[None]:
    """submitit's launcher reads results one after the other, and gives up all when a queue has killed one."""
    if not type(launcher).__module__.startswith("hydra_plugins.hydra_submitit_launcher"):
        yield
        return
    import submitit

    class Lost:
        def __init__(self, job: Any) -> None:
            self._job = job

        def results(self) -> list[Any]:
            try:
                return list(self._job.results())
            except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
                print(str(error).splitlines()[0], file=sys.stderr)
                return [None]

    executor: Any = submitit.AutoExecutor
    whole = executor.map_array
    executor.map_array = lambda *given: [Lost(job) for job in whole(*given)]
    try:
        yield
    finally:
        executor.map_array = whole
