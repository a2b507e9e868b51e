"""What the start model is asked of the text that is replayed, before training, and where that is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from framework.batch import Batch, Distribution
from framework.config import build, carrying, tabled
from framework.config.build import Inspected, Prepared
from framework.data import cache, loader
from framework.data.buffer import Line
from framework.data.collate import collate
from framework.data.loader import SUPERVISED, Cut
from framework.losses import sft as token_losses
from framework.losses.inputs import inputs
from framework.stages import remembered
from framework.stages.coupling import policy_logps
from framework.stages.reference import Cached, cached
from framework.stages.sft import TokenObjective
from framework.stages.started import STARTED, StartedObjective, means, scale_of
from framework.strategy.base import Engine, World


def mixed(prepared: Prepared, engine: Engine, cut: Cut) -> Any:
    """The objective of supervised rows, of which replayed ones follow the start model if that was asked."""
    names = [table.name for table in prepared.tables]
    chosen = prepared.run.replay
    first = len(prepared.run.data.train)
    if inputs(prepared.loss) & set(STARTED):
        return _started(prepared, engine, cut, names, first)
    if chosen.objective == "text":
        return TokenObjective(prepared.loss, names)
    rows = [
        (source, row) for source in range(first, len(names)) for row in range(len(prepared.tables[source]))
    ]
    if chosen.max_forgetting is None:  # else any row may be wanted
        total = prepared.steps * prepared.run.batch.sequences
        picked = {(pick.source, pick.row) for pick in prepared.mixture.picks(0, total)}
        rows = [where for where in rows if where in picked]
    memory = _memory(prepared, engine, cut, prepared.tables, rows, sources=range(first, len(names)))
    return remembered.TowardsStart(prepared.loss, memory, names)


def held_out(prepared: Inspected) -> Any:
    """The objective of held-out rows, which nobody asks the start model about."""
    asks = inputs(prepared.loss) & set(STARTED)
    return TokenObjective(token_losses.sft if asks else prepared.loss)


def _started(
    prepared: Prepared, engine: Engine, cut: Cut, names: Sequence[str], first: int
) -> StartedObjective:
    """The start model's log-probability of every trained token, kept on disk."""
    by_table = [loader.held_out(table, **cut._asdict()) for table in prepared.tables]
    start = _logps(prepared, engine, "trained tokens", prepared.tables, chain(*by_table))
    scale = (1.0, 1.0)
    if "sample_weights" in inputs(prepared.loss):
        scale = scale_of(start, chain(*by_table[:first]), engine.world)
    return StartedObjective(prepared.loss, start, scale, own=first, sources=names)


def alone(prepared: Prepared, engine: Engine, cut: Cut) -> Any:
    """The objective of replay that is a term of its own."""
    if prepared.run.replay.objective == "text":
        return TokenObjective(token_losses.sft)
    rows = [(source, row) for source, table in enumerate(prepared.replay) for row in range(len(table))]
    memory = _memory(prepared, engine, cut, prepared.replay, rows, sources=None)
    return remembered.TowardsStart(partial(token_losses.sft), memory)


def surprise(
    prepared: Prepared, engine: Engine, cut: Cut, strata: Mapping[str, Sequence[Line]] | None
) -> dict[str, list[float]]:
    """What the start model loses on rows that might be left: nats a trained token of each, by stratum; minus
    infinity for one that this run would not learn from.

    `engine` holds the start weights; `strata` are rank 0's. Collective.
    """
    run, told = prepared.run, {}
    for name, lines in engine.world.broadcast(strata).items():
        told[name] = [-math.inf] * len(lines)
        if not lines:
            continue
        file = carrying.filed(run, lines, name=name)
        (table,) = tabled.text(prepared, [file], truncation=carrying.shortened(run), on_bad_row="drop")
        start = _logps(prepared, engine, "rows to leave", [table], loader.held_out(table, **cut._asdict()))
        for row, (_, line) in enumerate(table.places(np.arange(len(table)))):
            alone = collate([table.example(row)], [0], packing=cut.packing, pad_id=cut.pad_id)
            (logps,) = start([alone])
            told[name][line - 1] = float(means(logps, alone)[0])
    return told


def _logps(
    prepared: Prepared, engine: Engine, what: str, tables: Sequence[Any], micros: Iterable[Batch]
) -> Cached:
    """The start model's log-probability of every trained token of `tables`, which `micros` hold; on disk."""
    identity = {"what": what, **_start(prepared, engine.world, tables)}
    where = Path(prepared.run.data.cache_dir) / "start"
    return cached(where, identity, micros, ask=partial(policy_logps, engine), world=engine.world)


def _memory(
    prepared: Prepared,
    engine: Engine,
    cut: Cut,
    tables: Sequence[Any],
    rows: Sequence[tuple[int, int]],
    *,
    sources: Any,
) -> remembered.Memory:
    run, vocabulary = prepared.run, prepared.description.vocab_size
    asked = Distribution(
        vocabulary=vocabulary, temperature=1.0, likeliest=min(run.replay.likeliest, vocabulary)
    )
    identity = {
        "what": "likeliest tokens",
        "rows": cache.fingerprint({"rows": [list(where) for where in rows]}),
        **_start(prepared, engine.world, tables),
    }
    micros = cut.step(tables, rows, SUPERVISED, None).micros
    where = Path(run.data.cache_dir) / "start"
    return remembered.remember(where, identity, micros, engine, asked, sources)


def _start(prepared: Prepared, world: World, tables: Sequence[Any]) -> dict[str, Any]:
    """What decides the start model's answers."""
    run = prepared.run
    return {
        "model": prepared.description.fingerprint,
        "seed": run.seed if run.model.init == "random" else None,
        "tables": [table.fingerprint for table in tables],
        "precision": run.precision,
        "attention": build.attention_of(prepared, world.device),
    }
