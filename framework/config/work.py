"""What every rank does with a run: join the others, train, write what is left."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from framework.cluster import directory
from framework.cluster.signals import StopRequest
from framework.config import (
    build,
    carrying,
    finish,
    fp8,
    judging,
    leaving,
    pairs,
    record,
    remembering,
    retention,
    shortage,
    speed,
    stages,
    tabled,
)
from framework.config.build import Inspected, Prepared
from framework.config.schema import Run
from framework.config.stage import SUPERVISED, writes
from framework.errors import DONE, INTERRUPTED, ConfigError, DataError
from framework.models import answering
from framework.models.actor_critic import CRITIC, POLICY, part
from framework.models.export import export
from framework.rollout.hf import complete
from framework.stages.base import Term
from framework.strategy.base import Engine, World
from framework.strategy.world import connect
from framework.track.base import Tracker
from framework.track.console import Console
from framework.track.fanout import Fanout
from framework.track.jsonl import Jsonl
from framework.train.checkpoint import Checkpointer
from framework.train.evaluate import evaluate
from framework.train.meter import Speed
from framework.train.restore import Checkpoint
from framework.train.trainer import Result, train

SAMPLE_TOKENS = 64  # the longest answer shown: enough to see what kind of answer it is


def work(run: Run) -> int:
    """Train `run` on this rank, from its start or from where it stopped. Returns the exit status."""
    with StopRequest() as stop, ExitStack() as closing:
        prepared = build.prepare(run)
        world = _join(run, closing)
        pairs.check_device(run, world.device.type)  # before there is a directory to say that it failed
        agree(prepared, world)
        checkpoints = build.checkpointer(prepared, world)
        resume = _resume(run, checkpoints)
        where = Path(run.run_dir)
        if world.rank == 0 and not leaving.asks(run):
            leaving.leave(prepared)
        tracker = open_tracker(prepared, world, resumed_at=None if resume is None else resume.step)
        doubts = prepared.probes.doubts if prepared.probes is not None else ()
        notes = (carrying.told(prepared), leaving.told(run), fp8.told(prepared), *doubts)
        for said in notes if resume is None else ():
            if said is not None:
                tracker.log("event", {"message": said}, step=0)
        status = "failed"
        try:
            with shortage.explained(run, world, prepared):
                result, retained = _train(prepared, world, tracker, stop, checkpoints, resume)
            if result.status == "done" and run.checkpoint.export and world.rank == 0:
                show_samples(prepared, where / "model", tracker, step=result.progress.step)
            status = result.status
        finally:
            tracker.close(status)
        if world.rank == 0:
            directory.write_result(where, summary(prepared, result, retained))
        world.barrier()  # nobody leaves before the result is written
    return DONE if result.status == "done" else INTERRUPTED


def measure(run: Run, checkpoint: Path) -> tuple[int, dict[str, float]]:
    """Held-out metrics of a checkpoint of `run`: (step, metrics). Collective. Supervised runs need no
    training data for it.

    `checkpoint` is a step's directory, or a run's, whose newest it is. Raises UserError, CheckpointError.
    """
    bare = run.stage.name == "sft" and not (run.evaluate.prompts or run.evaluate.retention)
    inspected = build.inspect(run) if bare else build.prepare(run)
    if not (run.data.eval or run.reward.environment or run.evaluate.prompts or run.evaluate.retention):
        raise ConfigError(
            "nothing to measure on: data.eval is empty; type 'data.eval=[{path: held_out.jsonl}]'"
        )
    with ExitStack() as closing:
        return _measure(inspected, _join(run, closing), checkpoint)


def agree(prepared: Prepared, world: World) -> None:
    """Refuse, on every rank, data that is not the same on all of them. Collective."""
    tables = (
        *prepared.tables,
        *prepared.replay,
        *prepared.held_out,
        *prepared.retention,
        *prepared.important,
        *prepared.questions,
        *prepared.retain_questions,
    )
    by_rank = world.gather([(table.name, table.fingerprint) for table in tables])
    for rank, theirs in enumerate(by_rank):
        if len(theirs) != len(by_rank[0]):
            raise DataError(
                f"rank {rank} has {len(theirs)} sources and rank 0 {len(by_rank[0])}; expected the same "
                "everywhere: with replay.carry every machine must see the directory of the earlier run"
            )
        odd = [name for (name, print_), other in zip(theirs, by_rank[0], strict=True) if other[1] != print_]
        if odd:
            raise DataError(
                f"{odd[0]}: rank {rank} has read other tokens than rank 0; expected the same everywhere: "
                "give every machine the same files and versions, and an environment that repeats its rows"
            )


def open_tracker(prepared: Prepared, world: World, resumed_at: int | None) -> Tracker:
    """Where this run is recorded: on rank 0 everywhere that was asked for, elsewhere nowhere."""
    if world.rank != 0:
        return Fanout([])
    run, where, config = prepared.run, Path(prepared.run.run_dir), record.shown(prepared.run)
    trackers: list[Tracker] = [
        Jsonl(where / "metrics.jsonl", resume_step=resumed_at),
        Console(steps=prepared.steps, mode=run.tracker.console),
    ]
    if run.tracker.tensorboard:
        from framework.track.tensorboard import TensorBoard

        trackers.append(TensorBoard(where, resume_step=resumed_at))
    if run.tracker.wandb is not None:
        from framework.track.wandb import Wandb

        hide = record.masked(run)
        options = {**run.tracker.wandb.model_dump(), "objective": build.plan(prepared).metric}
        options |= {
            "tags": [hide(tag) for tag in options["tags"]],
            "group": hide(options["group"] or "") or None,
        }
        trackers.append(Wandb(where, config=config, job_type=run.stage.name, name=where.name, **options))
    if run.tracker.report:
        from framework.track.report import Report

        trackers.append(Report(where, config=config))  # last: it reads what the others have written
    return Fanout(trackers)


def write_model(inspected: Inspected, engine: Engine, where: Path) -> None:
    """The trained model as a directory that transformers or peft loads. Collective."""
    export(
        where,
        description=inspected.description,
        weights=engine.weights()
        if inspected.critic is None
        else part(engine.weights(without=CRITIC), POLICY),
        adapter=build.adapter_of(inspected.run),
        rank=engine.world.rank,
    )


def show_samples(prepared: Prepared, model: Path, tracker: Tracker, *, step: int) -> None:
    """What the written model answers to the first held-out prompts, beside what was to be answered."""
    count = prepared.run.evaluate.samples
    if count == 0 or not prepared.held_out or prepared.run.stage.name not in SUPERVISED:
        return  # other stages show answers of their own
    lm, tokenizer = answering.load(str(model), device=prepared.run.launch.device)
    prompts, rows = [], []
    table = prepared.held_out[0]
    for row in range(min(count, len(table))):
        ids, trained = table.example(row)
        first = int(trained.argmax())  # what comes before the first trained token is the prompt
        if first == 0:  # plain text has no prompt: show how the model goes on from its first words
            first = max(1, len(ids) // 4)
        prompts.append(ids[:first].tolist())
        prompt, reference = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:first], ids[first:])
        )
        rows.append({"prompt": prompt, "reference": reference})
    answers = complete(lm, tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS)
    for shown, answer in zip(rows, answers, strict=True):
        shown["after"] = answer.text
    tracker.log("samples", {"rows": rows}, step=step)


def summary(prepared: Prepared, result: Result, retained: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`result.json`: how the run ended, in numbers and paths."""
    run, progress = prepared.run, result.progress
    where, metric = Path(run.run_dir), build.plan(prepared).metric
    paths = {
        "run_dir": where,
        "metrics": where / "metrics.jsonl",
        "model": where / "model",
        "report": where / "report.html",
        "checkpoints": where / "checkpoints",
    }
    return {
        "status": result.status,
        "steps": progress.step,
        "of_steps": prepared.steps,
        "tokens": progress.tokens,
        "trained_tokens": progress.trained_tokens,
        "skipped": progress.skipped,
        "seconds": round(progress.seconds, 3),
        "metrics": dict(result.metrics),
        **(retained or {}),
        "best": {"metric": metric, "value": progress.best, "step": progress.best_step},
        "objective": result.metrics.get(metric) if metric else None,
        "paths": {name: str(path) for name, path in paths.items() if path.exists()},
    }


def _join(run: Run, closing: ExitStack) -> World:
    if run.launch.threads is not None:  # another launcher may have chosen differently
        torch.set_num_threads(run.launch.threads)
    world = connect(run.launch.device, timeout_s=run.launch.timeout_s)
    closing.callback(world.close)
    return world


# The engine lives in these two functions alone: it must be gone before the world is closed.


def _train(
    prepared: Prepared,
    world: World,
    tracker: Tracker,
    stop: StopRequest,
    checkpoints: Checkpointer,
    resume: Checkpoint | None,
) -> tuple[Result, dict[str, Any]]:
    engine = build.build_engine(prepared, world)
    if resume is not None:
        resume.expect(engine.trained)
    if leaving.asks(prepared.run):
        leaving.leave_surprising(prepared, engine)  # which still holds the start weights
    protection = finish.Protection(prepared, world, engine, resumed=resume is not None)
    engine = protection.engine
    writing = writes(prepared.run.stage)
    asked = prepared.questions or prepared.retain_questions
    rollout = judging.build_rollout(prepared, world) if writing or asked else None
    assess = (
        judging.build_assess(prepared, world, engine, rollout) if rollout and prepared.questions else None
    )
    stage = stages.build_stage(prepared, world, engine, rollout)
    watch = retention.build_watch(prepared, world, engine, stage, rollout)
    result = train(
        stage,
        engine,
        build.plan(prepared),
        learning_rate=build.learning_rate(prepared),
        checkpoints=checkpoints,
        tracker=tracker,
        stop=stop,
        resume=resume,
        assess=assess,
        watch=watch,
        speed=Speed(speed.cost_of(prepared), speed.peak_of(prepared.run, world.device)),
        scale=protection.scale,
    )
    told: dict[str, Any] = {}
    if result.status == "done":
        result, told = protection.finish(result, stage, watch, assess, tracker)
    if result.status == "done" and prepared.run.checkpoint.export:
        where = Path(prepared.run.run_dir) / "model"
        write_model(prepared, engine, where)
        tracker.artifact(where, kind="model")
    return result, {**retention.summary(watch), **told}


def _measure(prepared: Inspected, world: World, checkpoint: Path) -> tuple[int, dict[str, float]]:
    run = prepared.run
    identity = {"model": prepared.description.fingerprint, "adapter": run.adapter.model_dump(mode="json")}
    found = Checkpointer(Path(run.run_dir), world=world, keep=1, identity=identity).open(checkpoint)
    engine = build.build_engine(prepared, world)
    found.expect(engine.trained)
    if isinstance(prepared, Prepared):  # before loading: a reference may be what the engine begins with
        stage = stages.build_stage(prepared, world, engine, judging.build_rollout(prepared, world))
        terms = stage.held_out()
    else:
        tables = tabled.read(prepared, run.data.eval)
        sets = stages.held_out_sets(prepared, tables, world)
        objective = remembering.held_out(prepared)
        terms = {name: Term(objective, micros) for name, micros in sets.items()}
    engine.load_state_dict(found.updates, found.read)
    metrics = evaluate(engine, terms)
    if isinstance(prepared, Prepared) and prepared.questions:
        rollout = judging.build_rollout(prepared, world)
        metrics |= judging.build_assess(prepared, world, engine, rollout)(found.step)[0]
    return found.step, metrics


def _resume(run: Run, checkpoints: Checkpointer) -> Checkpoint | None:
    """Where to go on from. `resume=never` was settled before the workers started."""
    if run.resume in ("auto", "never"):
        return checkpoints.newest()
    return checkpoints.newest() or checkpoints.open(Path(run.resume))
