"""The loop, whole: ask the stage for terms, count units, add gradients, step, record.

It knows no loss, no strategy and no data format. Everything that decides the numbers is a function
of the step: the learning rate, the random seeds, the data position. So a resumed run needs the step,
the engine's tensors and the stage's small state, and repeats the bits of a run never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from framework.errors import CheckpointError, SapwoodError
from framework.keyed import key
from framework.stages.base import Stage, Term
from framework.strategy.base import Engine, EngineState, World
from framework.track.base import Tracker
from framework.train.evaluate import evaluate
from framework.train.meter import Meter, Speed


class Stop(Protocol):
    """Somebody may ask this process to end."""

    @property
    def requested(self) -> bool: ...


class Saved(Protocol):
    """A checkpoint that was verified and can be read."""

    @property
    def step(self) -> int: ...

    @property
    def updates(self) -> int: ...

    @property
    def state(self) -> Mapping[str, Any]: ...

    def read(self, name: str, which: str, start: int, stop: int) -> torch.Tensor: ...


class Save(Protocol):
    """Where checkpoints go."""

    def save(self, step: int, engine_state: EngineState, state: Mapping[str, Any]) -> Path: ...


Report = tuple[str, Mapping[str, Any]]
"""(kind, metrics), a line for the tracker."""

Assess = Callable[[int], tuple[Mapping[str, float], Sequence[Report]]]
"""Optimizer steps done -> metrics beside the held-out losses, and lines. Collective; alike on all ranks."""


class Watch(Protocol):
    """Looks at the trained model now and then, beside evaluations, and may change what is trained on next.

    Collective; alike on all ranks.
    """

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Before the first step, with the start weights in the engine; `saved` as `state_dict` gave it."""

    def due(self, step: int) -> bool:
        """Whether to look after `step` optimizer steps."""

    def look(self, step: int) -> Sequence[Report]:
        """Lines for the tracker."""

    def state_dict(self) -> dict[str, Any]: ...


class Scale(Protocol):
    """Finds the scales of terms that ask for a share of the gradient. Collective; alike on all ranks."""

    def __call__(self, terms: Sequence[Term], *, seed: int, step: int) -> Sequence[Term]:
        """The terms of a step with scales to train by."""

    def line(self) -> Mapping[str, float]:
        """Metrics for the training line."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps. 0 = never."""

    steps: int
    seed: int
    max_grad_norm: float | None
    max_skipped: int  # consecutive steps with a gradient that is not finite before giving up
    log_every: int
    evaluate_every: int
    evaluate_at_start: bool
    checkpoint_every: int
    metric: str | None  # the held-out metric that "best" follows
    goal: str  # whether that should be small ("min") or large ("max")


@dataclass
class Progress:
    """What a run has done so far: the trainer's part of a checkpoint."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    evaluated: int | None = None  # the step of the last held-out evaluation
    best: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Result:
    """How a run ended: "done" or "interrupted", and its last held-out metrics."""

    status: str
    progress: Progress
    metrics: Mapping[str, float]


def seed_micro(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed every generator of this process for one micro-batch: dropout needs no saved state."""
    torch.manual_seed(key(seed, "micro", step, micro, rank))


def denominators(world: World, terms: Sequence[Term]) -> list[float]:
    """Units of each term over all ranks and micro-batches, from masks alone. One small all-reduce.

    At least 1, so that a step in which nothing is trained has gradients of zero rather than NaN.
    """
    units = world.sum([sum(batch.units for batch in term.micros) for term in terms])
    return [count if count > 0 else 1.0 for count in units]


def accumulate(engine: Engine, terms: Sequence[Term], *, seed: int, step: int, meter: Meter) -> None:
    """Forward and backward of every micro-batch of one optimizer step."""
    units = denominators(engine.world, terms)
    micros = [(i, batch) for i, term in enumerate(terms) for batch in term.micros]
    for number, (i, batch) in enumerate(micros):
        seed_micro(seed, step, number, engine.world.rank)
        with engine.micro(last=number == len(micros) - 1):
            items = terms[i].objective(engine, batch)
            engine.backward(items.total() * (terms[i].scale / units[i]))
        meter.add(items, units=batch.units, term=terms[i].name)
        meter.work(batch)
    for term in terms:
        meter.count(term.stats)


def train(
    stage: Stage,
    engine: Engine,
    plan: Plan,
    *,
    learning_rate: Callable[[int], float],
    checkpoints: Save,
    tracker: Tracker,
    stop: Stop,
    resume: Saved | None = None,
    assess: Assess | None = None,
    watch: Watch | None = None,
    speed: Speed | None = None,
    scale: Scale | None = None,
) -> Result:
    """Train until `plan.steps` or until `stop`, from the start or from `resume`.

    `assess` measures what no held-out loss says, whenever held-out losses are measured; `watch` has a cadence
    of its own; `scale` finds coefficients that were not given; `speed` makes lines tell how much of the
    device is used. Checkpoints wait for a stage that is in the middle of something, and so does a stop.

    Collective. Returns "interrupted" after a checkpoint at the last whole step, or "done". Raises
    SapwoodError when `plan.max_skipped` steps in a row had a gradient that is not finite.
    """
    world = engine.world
    progress = Progress()
    metrics: dict[str, float] = {}
    if watch is not None:  # the engine holds the start weights until here
        watch.begin(None if resume is None else resume.state.get("watch"))
    if resume is not None:
        engine.load_state_dict(resume.updates, resume.read)
        stage.load_state_dict(resume.state["stage"])
        progress = Progress(**resume.state["progress"])
        metrics = dict(resume.state["metrics"])
        if scale is not None:
            scale.load_state_dict(resume.state["scale"])
    began = time.perf_counter() - progress.seconds
    saved_at = progress.step if resume is not None else -1

    def report(lines: Sequence[Report]) -> None:
        for kind, line in lines:
            tracker.log(kind, line, step=progress.step)

    def measure() -> None:
        progress.evaluated = progress.step
        metrics.clear()
        metrics.update(evaluate(engine, stage.held_out()))
        if assess is not None:
            found, lines = assess(progress.step)
            metrics.update(found)
            report(lines)
        value = metrics.get(plan.metric) if plan.metric else None
        if value is not None and math.isfinite(value):
            better = math.inf if progress.best is None else progress.best - value
            if progress.best is None or (better > 0 if plan.goal == "min" else better < 0):
                progress.best, progress.best_step = value, progress.step
        tracker.log("eval", metrics, step=progress.step)

    def save(*, stopping: bool) -> None:
        nonlocal saved_at
        if saved_at == progress.step:
            return
        progress.seconds = time.perf_counter() - began
        state = {"stage": stage.state_dict(), "progress": asdict(progress), "metrics": metrics}
        if watch is not None:
            state["watch"] = watch.state_dict()
        if scale is not None:
            state["scale"] = scale.state_dict()
        try:
            path = checkpoints.save(progress.step, engine.state_dict(), state)
        except CheckpointError as error:
            # Alike on all ranks; the older checkpoint stands. Only the last one has to succeed.
            if progress.step == plan.steps or stopping:
                raise
            message = f"no checkpoint at step {progress.step}, training goes on: {error}"
            tracker.log("event", {"message": message}, step=progress.step)
            return
        tracker.artifact(path, kind="checkpoint")
        saved_at = progress.step

    def evaluation_due() -> bool:
        if progress.evaluated == progress.step or not (stage.held_out() or assess is not None):
            return False
        if progress.step == 0:
            return plan.evaluate_at_start
        return progress.step == plan.steps or _due(progress.step, plan.evaluate_every)

    # Also after a resume: a run that was stopped right before an evaluation makes up for it.
    if evaluation_due():
        measure()
    if watch is not None and watch.due(progress.step):
        report(watch.look(progress.step))
    report(stage.reports())
    meter = Meter(world, speed)
    owed = False  # a checkpoint that was due while the stage was in the middle of something
    while progress.step < plan.steps:
        step = progress.step
        rate = learning_rate(step)
        terms = stage.next(step)
        if scale is not None:
            terms = scale(terms, seed=plan.seed, step=step)
        accumulate(engine, terms, seed=plan.seed, step=step, meter=meter)
        report(stage.reports())
        norm = engine.step(lr=rate, max_grad_norm=plan.max_grad_norm)

        progress.step += 1
        progress.tokens += int(sum(term.stats.get("tokens", 0) for term in terms))
        progress.trained_tokens += int(sum(term.stats.get("trained_tokens", 0) for term in terms))
        del terms  # with what other models said of them, which may outweigh all else of a step
        applied = math.isfinite(norm)
        progress.skipped += not applied
        progress.skipped_in_a_row = 0 if applied else progress.skipped_in_a_row + 1

        last = progress.step == plan.steps
        if last or _due(progress.step, plan.log_every):
            line = meter.line() | {"grad_norm": norm, "lr": rate, "skipped": progress.skipped}
            line |= {} if scale is None else scale.line()
            tracker.log("train", line, step=progress.step)
        if progress.skipped_in_a_row > plan.max_skipped > 0:
            raise SapwoodError(
                f"the gradient was not finite for {progress.skipped_in_a_row} steps in a row (up to step "
                f"{progress.step}); weights are those before them. Lower optim.lr, try precision=fp32, or "
                "look at the last rows with launch/preview.py"
            )
        resting = stage.resting
        stopping = bool(world.max([float(stop.requested)])[0]) and resting
        owed = owed or _due(progress.step, plan.checkpoint_every)
        with meter.paused():
            if evaluation_due() and (last or not stopping):
                measure()
            if watch is not None and watch.due(progress.step) and (last or not stopping):
                report(watch.look(progress.step))
            if last or stopping or (owed and resting):
                save(stopping=stopping)
                owed = False
        if stopping and not last:
            return Result("interrupted", progress, metrics)
    progress.seconds = time.perf_counter() - began
    return Result("done", progress, metrics)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
