"""A search: each trial's settings follow from how the earlier ones did. The proposals are Optuna's.

The study lies in a file of the sweep's directory, or in any storage Optuna knows, and says all there is to
know: a search that was stopped, killed or given more trials goes on from it. What is proposed depends on
(seed, trials so far) alone, so one that was interrupted proposes what it would have proposed anyway.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from framework.cluster import directory, records
from framework.config import secrets, space, sweeping
from framework.config.space import Choice, Dimension
from framework.config.sweepers import Job, Kept
from framework.errors import ConfigError
from framework.keyed import key
from framework.track import sweep as page

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

STUDY = "study.log"  # in the sweep's directory: Optuna's journal, which needs no locks of the file system
RETRY = "retry of"  # attribute of a trial: the number of the failed one whose settings it tries again
KEPT_IN = "sweep"  # attribute of a trial: the directory its record lies in


class Search(Kept):
    """`hydra.sweeper.n_trials` trials, `n_jobs` at a time; conf/sweep/optuna.yaml explains the settings."""

    def work(self, arguments: list[str]) -> None:
        settings = sweeping.check(self.config.hydra)
        assert isinstance(settings, sweeping.Search)
        dimensions = space.dimensions(arguments, settings.params or {})
        self.fixed = {name: d for name, d in dimensions.items() if len(d.values) == 1}
        self.free = {name: d for name, d in dimensions.items() if len(d.values) > 1}
        if not self.free:
            raise ConfigError(
                "sweep=optuna: nothing to search in; type 'optim.lr=tag(log,interval(1e-6,1e-4))' or another "
                "KEY=interval(A,B) or KEY=A,B,C"
            )
        self.chosen = self.objectives(settings.objectives)
        log = [name for name, d in self.free.items() if not isinstance(d, Choice) and d.log]
        self.describe(objectives=self.chosen, log=log, n_trials=settings.n_trials)
        self.study = open_study(self.directory, settings, self.chosen)
        if settings.pruner is not None and self.config.evaluate.every is None:
            print(
                "no trial will be pruned: evaluate.every=STEPS gives the pruner something to judge by",
                file=sys.stderr,
            )
        self._tell_what_is_decided()
        if self.task.sweep.retry:
            self._retry()
        attempted: set[int] = set()
        while batch := self._batch(settings, attempted):
            attempted |= {trial.number for trial in batch}
            jobs = {trial.number: self._job(trial) for trial in batch}
            different = {job.name: job for job in jobs.values()}  # two trials may be of the same settings
            self.start([job for job in different.values() if not self.decided(job)])
            for trial in batch:
                self._tell(trial, jobs[trial.number])

    def _batch(self, settings: sweeping.Search, attempted: set[int]) -> list[FrozenTrial]:
        """Trials to carry out together: first those an earlier start has left, then new ones."""
        from optuna.trial import TrialState

        batch = [trial for trial in self._ours(TrialState.RUNNING) if trial.number not in attempted]
        while len(batch) < settings.n_jobs:
            trials = self.study.get_trials(deepcopy=False)
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            again = sum(RETRY in trial.user_attrs for trial in trials)
            if len(trials) - again >= settings.n_trials and not waiting:
                break
            self.study.sampler = sampler(settings, len(trials))
            try:
                trial = self.study.ask({name: distribution(d) for name, d in self.free.items()})
            except ValueError as error:  # an earlier start of the study had other choices
                raise ConfigError(
                    f"hydra.sweeper: the study was begun with other choices ({error}); expected the same; "
                    "type hydra.sweeper.study_name=OTHER"
                ) from error
            trial.set_user_attr(KEPT_IN, str(self.directory))
            batch.append(self._frozen(trial.number))
        return batch[: settings.n_jobs]

    def _job(self, trial: FrozenTrial) -> Job:
        """A trial's settings as they would be typed."""
        varied = {}
        for name, d in self.free.items():
            value = trial.params[name]
            varied[name] = value if isinstance(d, Choice) else d.text(value)
        fixed = (f"{name}={d.values[0]}" for name, d in self.fixed.items())
        lines = (*fixed, *(f"{name}={value}" for name, value in varied.items()))
        return Job(trial.number, lines, varied, trial=trial.number)

    def _tell(self, trial: FrozenTrial, job: Job) -> None:
        """Tell the study how a trial ended. One that was killed or interrupted stays open, to be resumed."""
        from optuna.trial import TrialState

        found = self.look(job)
        status, result = found.get("status"), {}
        if status == records.DONE:
            result = directory.result(Path(found["run_dir"])) or {}
            values = [page.value(result, objective["metric"]) for objective in self.chosen]
            if None in values:
                raise ConfigError(self._absent(values, result, found["run_dir"]))
            if all(value is not None and math.isfinite(value) for value in values):
                self.study.tell(trial.number, [float(value) for value in values if value is not None])
            else:  # diverged: the worst there is, where the sampler knows how to take that
                state = TrialState.PRUNED if len(values) == 1 else TrialState.FAIL
                self.study.tell(trial.number, state=state)
        elif status == records.PRUNED:
            self.study.tell(trial.number, state=TrialState.PRUNED)
        elif status in (records.FAILED, records.REFUSED):
            self.study.tell(trial.number, state=TrialState.FAIL)
        else:
            return
        self._report(trial, job, found)

    def _report(self, trial: FrozenTrial, job: Job, found: Mapping[str, Any]) -> None:
        told = self._frozen(trial.number)
        values = ", ".join(f"{value:.6g}" for value in told.values or ()) or "no value"
        line = f"trial {trial.number}: {found['status']}, {values}"
        if len(self.chosen) == 1 and (best := self._best()) is not None:
            line += f" (best so far {best.value:.6g}, of trial {best.number})"
        print(line, file=sys.stderr)

    def _best(self) -> FrozenTrial | None:
        try:
            return self.study.best_trial
        except ValueError:  # none has finished
            return None

    def _absent(self, values: Sequence[float | None], result: Mapping[str, Any], where: str) -> str:
        metric = self.chosen[values.index(None)]["metric"]
        known = ", ".join(sorted(result.get("metrics") or {})) or "none"
        if metric is None:
            return (
                f"hydra.sweeper.objectives: {where} has no objective; expected held-out data to measure it "
                "on; type 'data.eval=[{path: held_out.jsonl}]'"
            )
        return (
            f"hydra.sweeper.objectives: {where} has no {metric}; expected one of its metrics: {known}; "
            "the same command goes on with another: 'hydra.sweeper.objectives=[{metric: NAME, goal: min}]'"
        )

    def _tell_what_is_decided(self) -> None:
        """Trials whose end this process was not there to tell: it was killed, or the metric was mistyped."""
        from optuna.trial import TrialState

        for trial in self._ours(TrialState.RUNNING):
            if set(trial.params) == set(self.free):
                job = self._job(trial)
                if self.decided(job):
                    self._tell(trial, job)
            else:
                self.study.tell(trial.number, state=TrialState.FAIL)

    def _retry(self) -> None:
        """Put the settings of failed trials in front of what is proposed, each once."""
        from optuna.trial import TrialState

        trials = self.study.get_trials()
        again = {trial.user_attrs[RETRY] for trial in trials if RETRY in trial.user_attrs}
        for trial in self._ours(TrialState.FAIL):
            if trial.number not in again and set(trial.params) == set(self.free):
                self.study.enqueue_trial(trial.params, user_attrs={RETRY: trial.number})

    def _ours(self, *states: Any) -> Iterator[FrozenTrial]:
        """Trials in some states whose records lie here; others' may run at this moment."""
        for trial in self.study.get_trials(states=states):
            if trial.user_attrs.get(KEPT_IN) == str(self.directory):
                yield trial

    def _frozen(self, number: int) -> FrozenTrial:
        found: FrozenTrial = self.study.get_trials(deepcopy=False)[number]
        return found


class Pruner:
    """Reports a running trial's held-out values to its study, and says when they leave it no hope."""

    def __init__(self, sweep: Path, settings: DictConfig, *, trial: int, metrics: Path) -> None:
        """`settings` are `hydra.sweeper`'s; `metrics` is the metrics.jsonl that the run is going to write."""
        import optuna

        self._objective = records.read(sweep / records.SWEEP)["objectives"][0]
        self._study = _study(sweep, settings.storage, settings.study_name, pruner=pruner(settings))
        (found,) = (t for t in self._study.get_trials() if t.number == trial)
        self._trial = optuna.Trial(self._study, found._trial_id)
        self._seen = set(found.intermediate_values)
        self._file, self._read, self._over = metrics, 0, False

    def hopeless(self) -> bool:
        """Whether the trial is to be ended, by what its run has measured until now. Once so, always so."""
        for step, value in self._new():
            if self._over:
                break
            self._trial.report(value, step)
            self._over = self._trial.should_prune()
        return self._over

    def _new(self) -> Iterator[tuple[int, float]]:
        """(step, value) of evaluations since the last look. Before the first step all trials are alike."""
        if not self._file.exists() or self._file.stat().st_size <= self._read:
            return
        with self._file.open("rb") as file:
            file.seek(self._read)
            *lines, rest = file.read().split(b"\n")
            self._read = file.tell() - len(rest)  # a line is being written
        for line in lines:
            found = json.loads(line) if line.startswith(b"{") else {}
            step = found.get("step", 0)
            value = followed(found, self._objective) if found.get("kind") == "eval" else None
            if value is not None and step > 0 and step not in self._seen:
                self._seen.add(step)
                yield step, value


def followed(line: Mapping[str, Any], objective: Mapping[str, Any]) -> float | None:
    """An objective's value in an evaluation's line. Without a metric it is what `evaluate` follows: the first
    set's loss, or with goal max the first questions' score.
    """
    metric = objective["metric"]
    if metric is None:
        end = "/score" if objective["goal"] == "max" else "/loss"
        metric = next((name for name in line if name.endswith(end)), "")
    found = line.get(metric)
    return float(found) if isinstance(found, int | float | str) else None


def open_study(sweep: Path, settings: sweeping.Search, chosen: Sequence[Mapping[str, Any]]) -> Any:
    """The study of a sweep, made at its first start. Raises ConfigError."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [{"min": "minimize", "max": "maximize"}[objective["goal"]] for objective in chosen]
    study = _study(sweep, settings.storage, settings.study_name, directions=directions)
    found = [direction.name.lower() for direction in study.directions]
    if found != directions:
        raise ConfigError(
            f"hydra.sweeper.objectives: found {', '.join(directions)} for a study that was begun with "
            f"{', '.join(found)}; expected the same; type hydra.sweeper.study_name=OTHER"
        )
    return study


def sampler(settings: sweeping.Search, trials: int) -> optuna.samplers.BaseSampler:
    """Proposes the trial after so many: TPE (Bergstra et al. 2011; several objectives: Ozaki et al. 2022)."""
    import optuna

    return optuna.samplers.TPESampler(
        n_startup_trials=settings.startup_trials,
        constant_liar=settings.n_jobs > 1,  # trials that run count as bad ones, or all would try the same
        seed=key(settings.seed, "trial", trials) % 2**32,
    )


def pruner(settings: DictConfig) -> optuna.pruners.BasePruner:
    """Ends a trial whose best value is worse than the median of the others' at the same step."""
    import optuna

    return optuna.pruners.MedianPruner(
        n_startup_trials=settings.prune_after_trials, n_warmup_steps=settings.prune_from_step
    )


def distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """A dimension in Optuna's words."""
    from optuna import distributions

    if isinstance(dimension, Choice):
        return distributions.CategoricalDistribution(dimension.values)
    if dimension.whole:
        step = 1 if dimension.step is None else int(dimension.step)
        low, high = int(dimension.low), int(dimension.high)
        return distributions.IntDistribution(low, high, log=dimension.log, step=step)
    return distributions.FloatDistribution(
        dimension.low, dimension.high, log=dimension.log, step=dimension.step
    )


def _study(sweep: Path, storage: str | None, name: str | None, **options: Any) -> optuna.Study:
    """The study, made where there is none and its `directions` are given."""
    import optuna
    from optuna.storages import journal

    keeps: Any = storage
    if storage is None:
        file = str(sweep / STUDY)
        keeps = journal.JournalStorage(
            journal.JournalFileBackend(file, lock_obj=journal.JournalFileOpenLock(file))
        )
    called = name or sweep.name
    try:
        if "directions" in options:
            return optuna.create_study(storage=keeps, study_name=called, load_if_exists=True, **options)
        return optuna.load_study(storage=keeps, study_name=called, **options)
    except (ImportError, ValueError, OSError, optuna.exceptions.StorageInternalError) as error:
        raise ConfigError(
            f"hydra.sweeper.storage: {secrets.hidden(str(storage or sweep / STUDY))}: "
            f"{secrets.hidden(str(error)).splitlines()[0]}; expected a file that can be written or a "
            "database that can be reached, such as sqlite:///study.db"
        ) from error
