"""The composition root: from a validated run to objects, and from objects to a finished run directory.

The only place that knows all rooms. `prepare` does everything that can refuse a run before a weight is
loaded; `work` is what every rank does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from framework.batch import Batch
from framework.cluster import directory
from framework.cluster.signals import StopRequest
from framework.config import record, targets
from framework.config.schema import Run, Wsd
from framework.data import tables as tokenised
from framework.data.loader import Loader, held_out
from framework.data.mixture import Group, Mixture
from framework.data.sources import Source
from framework.data.tables import Table
from framework.errors import DONE, INTERRUPTED, ConfigError
from framework.losses.items import Items
from framework.models import load
from framework.models.export import export
from framework.stages.base import Term
from framework.stages.sft import Supervised, TokenObjective
from framework.strategy.base import Build, Engine, Strategy, Weights, World
from framework.strategy.world import connect
from framework.track.base import Tracker
from framework.track.console import Console
from framework.track.fanout import Fanout
from framework.track.jsonl import Jsonl
from framework.train.checkpoint import Checkpoint, Checkpointer
from framework.train.evaluate import evaluate
from framework.train.optim import adamw
from framework.train.schedule import Schedule, schedule
from framework.train.trainer import Plan, Result, train


@dataclass(frozen=True)
class Inspected:
    """A run whose loss is bound and whose model was looked at."""

    run: Run
    loss: Callable[..., Items]
    description: load.Description


@dataclass(frozen=True)
class Prepared(Inspected):
    """A run that nothing refuses any more: its data is tokenised, too."""

    tables: Sequence[Table]  # data.train first, then replay
    held_out: Sequence[Table]
    mixture: Mixture
    steps: int

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        return {
            "model": self.description.fingerprint,
            "adapter": self.run.adapter.model_dump(mode="json"),
            "data": {table.name: table.fingerprint for table in self.tables},
            "mixture": {
                "seed": self.run.seed,
                "shuffle": self.run.data.shuffle,
                "weights": [table.weight for table in self.tables],
                "replay": self.run.replay.fraction,
            },
            "batch.sequences": self.run.batch.sequences,
        }


def inspect(run: Run) -> Inspected:
    """Bind the loss and look at the model. Raises UserError."""
    description = load.inspect(
        run.model.path,
        revision=run.model.revision,
        gguf_file=run.model.gguf_file,
        init=run.model.init,
    )
    return Inspected(run, targets.loss(run), description)


def prepare(run: Run, *, progress: tokenised.Progress | None = None) -> Prepared:
    """Bind the loss, look at the model, tokenise the data; loads no weight and uses no accelerator.

    Every process of a host may call it: the first builds the cache, the others wait and map it. Raises
    UserError.
    """
    inspected = inspect(run)
    read = partial(_tokenised, inspected, progress=progress)
    train_tables, replay_tables = read(run.data.train), read(run.replay.sources)
    mixture = Mixture(
        _group(train_tables),
        _group(replay_tables) if replay_tables else None,
        fraction=run.replay.fraction,
        seed=run.seed,
        shuffle=run.data.shuffle,
    )
    steps = run.steps
    if steps is None:
        assert run.epochs is not None  # the schema: exactly one of the two
        steps = mixture.steps_for(run.epochs, run.batch.sequences)
    return Prepared(
        run=run,
        loss=inspected.loss,
        description=inspected.description,
        tables=_distinct([*train_tables, *replay_tables]),
        held_out=read(run.data.eval),
        mixture=mixture,
        steps=steps,
    )


def work(run: Run) -> int:
    """What every rank does: join the others, train, write what is left. Returns the exit status."""
    with StopRequest() as stop, ExitStack() as closing:
        prepared = prepare(run)
        world = connect(run.launch.device, timeout_s=run.launch.timeout_s)
        closing.callback(world.close)
        checkpoints = checkpointer(prepared, world)
        resume = _resume(run, checkpoints)
        where = Path(run.run_dir)
        tracker = open_tracker(prepared, world, resumed_at=None if resume is None else resume.step)
        status = "failed"
        try:
            engine = build_engine(prepared, world)
            if resume is not None:
                resume.expect(engine.trained)
            result = train(
                build_stage(prepared, world),
                engine,
                plan(prepared),
                learning_rate=learning_rate(prepared),
                checkpoints=checkpoints,
                tracker=tracker,
                stop=stop,
                resume=resume,
            )
            if result.status == "done" and run.checkpoint.export:
                write_model(prepared, engine, where / "model")
                tracker.artifact(where / "model", kind="model")
            status = result.status
        finally:
            tracker.close(status)
        if world.rank == 0:
            directory.write_result(where, summary(prepared, result))
        world.barrier()  # nobody leaves before the result is written
    return DONE if result.status == "done" else INTERRUPTED


def measure(run: Run, checkpoint: Path) -> tuple[int, dict[str, float]]:
    """Held-out metrics of a checkpoint of `run`: (step, metrics). Needs no training data. Collective.

    `checkpoint` is a step's directory, or a run's, whose newest it is. Raises UserError, CheckpointError.
    """
    inspected = inspect(run)
    tables = _tokenised(inspected, run.data.eval)
    if not tables:
        raise ConfigError(
            "nothing to measure on: data.eval is empty; type 'data.eval=[{path: held_out.jsonl}]'"
        )
    with ExitStack() as closing:
        world = connect(run.launch.device, timeout_s=run.launch.timeout_s)
        closing.callback(world.close)
        identity = {
            "model": inspected.description.fingerprint,
            "adapter": run.adapter.model_dump(mode="json"),
        }
        found = Checkpointer(Path(run.run_dir), world=world, keep=1, identity=identity).open(checkpoint)
        engine = build_engine(inspected, world)
        found.expect(engine.trained)
        engine.load_state_dict(found.updates, found.read)
        sets = _held_out(inspected, tables, world)
        objective = TokenObjective(inspected.loss)
        return found.step, evaluate(engine, {name: Term(objective, micros) for name, micros in sets.items()})


def checkpointer(prepared: Prepared, world: World) -> Checkpointer:
    """The run's checkpoints."""
    return Checkpointer(
        Path(prepared.run.run_dir) / "checkpoints",
        world=world,
        keep=prepared.run.checkpoint.keep,
        identity=prepared.identity,
    )


def build_stage(prepared: Prepared, world: World) -> Supervised:
    """Supervised fine-tuning on this rank's share of the data."""
    loader = Loader(
        prepared.tables,
        prepared.mixture,
        sequences=prepared.run.batch.sequences,
        **_cut(prepared, world),
    )
    objective = TokenObjective(prepared.loss, [table.name for table in prepared.tables])
    sets = _held_out(prepared, prepared.held_out, world)
    return Supervised(loader, objective, sets, TokenObjective(prepared.loss))


def build_engine(inspected: Inspected, world: World) -> Engine:
    """The model, spread over the ranks and filled."""
    run = inspected.run
    optimizer = partial(adamw, betas=run.optim.betas, eps=run.optim.eps, weight_decay=run.optim.weight_decay)
    structure, weights = build_structure(inspected, world.device), build_weights(inspected)
    return build_strategy(run, world).train(structure, weights, optimizer)


def build_structure(inspected: Inspected, device: torch.device) -> Build:
    """Makes the model without its weights; `device` decides how attention is computed."""
    run = inspected.run
    attention = load.attention_for(
        inspected.description, run.model.attention, device, precision=run.precision
    )
    return load.builder(
        inspected.description,
        adapter=_adapter(run),
        attention=attention,
        head_chunk_tokens=run.model.head_chunk_tokens,
    )


def build_weights(inspected: Inspected) -> Weights:
    """Reads or makes the weights, on rank 0."""
    run = inspected.run
    return load.reader(inspected.description, adapter=_adapter(run), seed=run.seed)


def build_strategy(run: Run, world: World) -> Strategy:
    """How the model is spread. Each strategy's libraries are imported only when it is chosen."""
    common = {"precision": run.precision, "checkpointing": run.model.activation_checkpointing}
    match run.strategy.name:
        case "ddp":
            from framework.strategy.ddp import Ddp

            return Ddp(world, **common)
        case "fsdp":
            from framework.strategy.fsdp2 import Fsdp

            return Fsdp(world, **common, reshard_after_forward=run.strategy.reshard_after_forward)
        case "zero3":
            from framework.strategy.zero import Zero

            return Zero(world, stage=3, **common)


def open_tracker(prepared: Prepared, world: World, resumed_at: int | None) -> Tracker:
    """Where this run is recorded: on rank 0 everywhere that was asked for, elsewhere nowhere."""
    if world.rank != 0:
        return Fanout([])
    run, where, config = prepared.run, Path(prepared.run.run_dir), record.shown(prepared.run)
    trackers: list[Tracker] = [Jsonl(where / "metrics.jsonl", resume_step=resumed_at)]
    trackers.append(Console(steps=prepared.steps, mode=run.tracker.console))
    if run.tracker.wandb is not None:
        from framework.track.wandb import Wandb

        options = run.tracker.wandb.model_dump()
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
        weights=engine.weights(),
        adapter=_adapter(inspected.run),
        rank=engine.world.rank,
    )


def plan(prepared: Prepared) -> Plan:
    """When things happen."""
    run = prepared.run
    first = f"{prepared.held_out[0].name}/loss" if prepared.held_out else None
    return Plan(
        steps=prepared.steps,
        seed=run.seed,
        max_grad_norm=run.optim.max_grad_norm,
        max_skipped=run.optim.max_skipped_steps,
        log_every=run.tracker.every,
        evaluate_every=run.evaluate.every or 0,
        evaluate_at_start=run.evaluate.at_start,
        checkpoint_every=run.checkpoint.every or 0,
        metric=run.evaluate.metric or first,
    )


def learning_rate(prepared: Prepared) -> Schedule:
    """The schedule over this run's steps."""
    chosen, total = prepared.run.schedule, prepared.steps
    warmup = chosen.warmup_steps
    if warmup is None:
        assert chosen.warmup_fraction is not None  # the schema: exactly one of the two
        warmup = round(total * chosen.warmup_fraction)
    decay = round(total * chosen.decay_fraction) if isinstance(chosen, Wsd) else 0
    return schedule(
        chosen.name,
        lr=prepared.run.optim.lr,
        total=total,
        warmup=warmup,
        min_ratio=getattr(chosen, "min_ratio", 0.0),
        decay=decay,
    )


def summary(prepared: Prepared, result: Result) -> dict[str, Any]:
    """`result.json`: how the run ended, in numbers and paths."""
    run, progress = prepared.run, result.progress
    where, metric = Path(run.run_dir), plan(prepared).metric
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
        "best": {"metric": metric, "value": progress.best, "step": progress.best_step},
        "objective": result.metrics.get(metric) if metric else None,
        "paths": {name: str(path) for name, path in paths.items() if path.exists()},
    }


def _tokenised(
    inspected: Inspected, sources: Sequence[Any], *, progress: tokenised.Progress | None = None
) -> list[Table]:
    """Tables of some of the run's sources, from the cache or made now."""
    run, description = inspected.run, inspected.description
    return tokenised.prepare(
        [Source(**source.model_dump()) for source in sources],
        tokenizer=description.tokenizer,
        chat_template=run.model.chat_template,
        max_length=run.data.max_length,
        truncation=run.data.truncation,
        train_on=run.data.train_on,
        on_bad_row=run.data.on_bad_row,
        cache_dir=run.data.cache_dir,
        workers=run.data.workers,
        vocab_size=description.vocab_size,
        progress=progress,
    )


def _cut(inspected: Inspected, world: World) -> dict[str, Any]:
    """How examples become this rank's micro-batches."""
    run = inspected.run
    return {
        "tokens_per_micro": run.batch.tokens_per_micro,
        "packing": run.data.packing,
        "rank": world.rank,
        "world_size": world.size,
        "pad_id": inspected.description.pad_id,
    }


def _held_out(inspected: Inspected, tables: Sequence[Table], world: World) -> dict[str, list[Batch]]:
    """This rank's micro-batches of every held-out set."""
    most, cut = inspected.run.evaluate.max_examples, _cut(inspected, world)
    return {table.name: held_out(table, max_examples=most, **cut) for table in tables}


def _adapter(run: Run) -> Mapping[str, Any] | None:
    return None if run.adapter.kind == "full" else run.adapter.model_dump(exclude={"kind"})


def _group(tables: Sequence[Table]) -> Group:
    weights = [table.weight for table in tables]
    given = [weight for weight in weights if weight is not None]
    return Group([table.trained for table in tables], given or None)


def _distinct(tables: Sequence[Table]) -> list[Table]:
    """The same tables with no name twice, since replay may come from a file named like one of data.train."""
    taken: set[str] = set()
    named = []
    for table in tables:
        name = table.name
        while name in taken:
            name += "-replay"
        taken.add(name)
        named.append(replace(table, name=name))
    return named


def _resume(run: Run, checkpoints: Checkpointer) -> Checkpoint | None:
    """Where to go on from. `resume=never` was settled before the workers started."""
    if run.resume in ("auto", "never"):
        return checkpoints.newest()
    return checkpoints.newest() or checkpoints.open(Path(run.resume))
