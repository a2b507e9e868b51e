"""The composition root: from a validated run to the objects that carry it out.

The only place that knows all rooms. `prepare` does everything that can refuse a run before a weight is
loaded; `config.work` is what every rank does with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from framework.batch import Batch
from framework.config import targets
from framework.config.schema import Run, Wsd
from framework.data import tables as tokenised
from framework.data.loader import Loader, held_out
from framework.data.mixture import Group, Mixture
from framework.data.sources import Source
from framework.data.tables import Table
from framework.losses.items import Items
from framework.models import load
from framework.stages.sft import Supervised, TokenObjective
from framework.strategy.base import Build, Engine, Strategy, Weights, World
from framework.train.checkpoint import Checkpointer
from framework.train.optim import adamw
from framework.train.schedule import Schedule, schedule
from framework.train.trainer import Plan


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
    read = partial(read_tables, inspected, progress=progress)
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
    sets = held_out_sets(prepared, prepared.held_out, world)
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
        adapter=adapter_of(run),
        attention=attention,
        head_chunk_tokens=run.model.head_chunk_tokens,
    )


def build_weights(inspected: Inspected) -> Weights:
    """Reads or makes the weights, on rank 0."""
    run = inspected.run
    return load.reader(inspected.description, adapter=adapter_of(run), seed=run.seed)


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


def read_tables(
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


def held_out_sets(inspected: Inspected, tables: Sequence[Table], world: World) -> dict[str, list[Batch]]:
    """This rank's micro-batches of every held-out set."""
    most, cut = inspected.run.evaluate.max_examples, _cut(inspected, world)
    return {table.name: held_out(table, max_examples=most, **cut) for table in tables}


def adapter_of(run: Run) -> Mapping[str, Any] | None:
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
