"""What a run leaves to the stages after it: RUN/buffer, what it was left itself grown by its own sources.

It is written before the first step, of the rows that the run is going to see, so that a run which is killed
has left it, too; and before a weight is read, so that refusals come early, but where the start model chooses.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from framework.config import environment, remembering, selfmade, stages
from framework.config.build import Prepared
from framework.config.carrying import DIRECTORY
from framework.config.nodes import Source
from framework.config.schema import Run
from framework.config.stage import ONLINE
from framework.data import buffer, rehearsed, sources, templates
from framework.data.buffer import COMPARED, MANIFEST, RESERVE, Buffer, Line, Stratum
from framework.data.chat import Encoder
from framework.data.sources import Located
from framework.data.tables import Conversations, Table
from framework.errors import DataError
from framework.strategy.base import Engine
from framework.train import commit

BLOCK = 1 << 16  # examples of the stream looked at together

Kept = list[tuple[Stratum, list[Line]]]
Ask = Callable[[Mapping[str, Sequence[Line]]], Mapping[str, Sequence[float]]]
"""What the model that training begins with loses on rows: name -> lines, name -> nats a token of each."""


class Own(NamedTuple):
    """A source of this run."""

    source: Source
    located: Located
    table: Table
    seen: np.ndarray  # [n] bool, which of its rows the run is going to see
    stage: str


def asks(run: Run) -> bool:
    """Whether the start model chooses the rows to leave."""
    return run.replay.select == "surprise"


def told(run: Run) -> str | None:
    """What to say of it at the start of a run; None where nothing takes time."""
    if not asks(run):
        return None
    return "replay.select: asks the model that training begins with which rows to leave for later stages"


def leave(prepared: Prepared, ask: Ask | None = None) -> None:
    """Write RUN/buffer, whole or not at all; one of the same rows stays as it is. For one process.

    `ask`, where the start model has a say, is called once. A reward model is no stage on the way of a policy
    and leaves nothing. Raises DataError, OSError.
    """
    run, where = prepared.run, Path(prepared.run.run_dir) / DIRECTORY
    if run.stage.name == "reward" or run.replay.stratum_tokens == 0:
        return
    grown, kept = _grown(prepared, ask)
    with contextlib.suppress(DataError):
        if where.exists() and buffer.read(where).identity == grown.identity:
            return
    write(where, grown, {stratum.shard: rows for stratum, rows in kept})


def leave_surprising(prepared: Prepared, engine: Engine) -> None:
    """The same with the rows that surprise the start model, whose weights `engine` must hold. Collective."""
    ask = partial(remembering.surprise, prepared, engine, stages.cut_of(prepared, engine.world))
    if engine.world.rank == 0:
        leave(prepared, ask)
    else:
        ask(None)


def write(where: Path, grown: Buffer, shards: dict[str, list[Line]]) -> None:
    """A directory that appears in one rename, each of its files on the disk before."""
    written, aside = (where.with_name(f"{where.name}.{word}") for word in ("tmp", "aside"))
    for debris in (written, aside):  # of a start that was killed
        shutil.rmtree(debris, ignore_errors=True)
    written.mkdir(parents=True)
    for shard, rows in shards.items():
        commit.write(written / f"{shard}.jsonl", [buffer.encoded(rows)])
    commit.write(written / MANIFEST, [grown.encode()])
    commit.sync_directory(written)
    if where.exists():  # of other rows: a start before the first checkpoint, with other files
        os.rename(where, aside)
    os.rename(written, where)
    commit.sync_directory(where.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _grown(prepared: Prepared, ask: Ask | None) -> tuple[Buffer, Kept]:
    """What was carried, then the run's own sources, without what is excluded."""
    run, carried = prepared.run, prepared.carried
    most = RESERVE * run.replay.stratum_tokens
    own, before = list(_own(prepared)), carried.buffer.strata if carried is not None else ()
    excluded = set(carried.excluded if carried is not None else run.replay.excluded)
    excluded |= {each.located.digest for each in own if each.table.name in excluded}
    excluded |= {stratum.source for stratum in before if stratum.name in excluded}
    kept: Kept = []
    for stratum in before:
        if carried is not None and not buffer.excludes(stratum, excluded):
            rows = buffer.lines(carried.directory, stratum)
            rows = buffer.draw(rows, tokens=most, excluded=excluded)
            kept.append((replace(stratum, **buffer.measures(rows)), rows))
    encode = Conversations(_encoder(prepared)).read
    first = len(kept)
    for each in own:
        if each.located.digest not in {*excluded, *(stratum.source for stratum, _ in kept)}:
            name = _free(each.table.name, [stratum.name for stratum, _ in kept])
            tokens = most if ask is None else COMPARED * most
            kept.append(_stratum(run.seed, each, name, encode, tokens, excluded))
    if ask is not None:
        nats = ask({stratum.name: rows for stratum, rows in kept[first:]})
        for at, (stratum, rows) in enumerate(kept[first:], start=first):
            rows = [rows[place] for place in buffer.surprising(nats[stratum.name])]
            rows = buffer.draw(rows, tokens=most)
            kept[at] = (replace(stratum, **buffer.measures(rows)), rows)
    kept = [(stratum, rows) for stratum, rows in kept if rows]
    parent = carried.buffer.identity if carried is not None else None
    return Buffer(tuple(stratum for stratum, _ in kept), tuple(sorted(excluded)), parent), kept


def _stratum(
    seed: int, own: Own, name: str, encode: rehearsed.Encode, tokens: int, excluded: Collection[str]
) -> tuple[Stratum, list[Line]]:
    """Rows of one source that have `tokens` together, with where they come from."""
    order = buffer.order(seed, name, len(own.table))
    rows = rehearsed.keep(
        own.table, own.located, order[own.seen[order]], encode, tokens=tokens, excluded=excluded
    )
    added = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    place, licence = own.source.path, own.source.licence
    return (
        Stratum(name, own.stage, place, own.located.digest, licence, added, **buffer.measures(rows)),
        rows,
    )


def _own(prepared: Prepared) -> Iterator[Own]:
    """What the run learns from and was not carried to it."""
    run, carried = prepared.run, prepared.carried
    given = environment.sources(run)[0]
    labelled = [(source, str(run.stage.name)) for source in given]
    labelled += [(source, "replay") for source in selfmade.sources_of(run, prepared.description)]
    tables = (*prepared.tables, *prepared.replay)
    for (source, stage), table, seen in zip(labelled, tables, _seen(prepared), strict=True):
        if carried is None or source not in carried.sources:
            yield Own(source, sources.locate(sources.Source(**source.model_dump())), table, seen, stage)


def _seen(prepared: Prepared) -> list[np.ndarray]:
    """Of each table [n] bool: rows that the stream of examples comes to, as it is planned at the start.

    Of prompts, and of text that is a term of its own, all.
    """
    run, tables = prepared.run, (*prepared.tables, *prepared.replay)
    if run.stage.name in ONLINE:
        return [np.ones(len(table), dtype=bool) for table in tables]
    seen = [np.zeros(len(table), dtype=bool) for table in prepared.tables]
    planned = prepared.steps * run.batch.sequences
    for start in range(0, planned, BLOCK):
        picked, rows, _ = prepared.mixture.columns(start, min(start + BLOCK, planned))
        for number, of in enumerate(seen):
            of[rows[picked == number]] = True
        if all(of.all() for of in seen):
            break
    return [*seen, *(np.ones(len(table), dtype=bool) for table in prepared.replay)]


def _encoder(prepared: Prepared) -> Encoder:
    """How a later stage of the same model will tokenise what it rehearses."""
    run, description = prepared.run, prepared.description
    return Encoder(
        description.tokenizer,
        templates.resolve(description.tokenizer, run.model.chat_template),
        max_length=run.data.max_length,
        truncation=run.data.truncation,
        train_on=run.data.train_on,
        vocab_size=description.vocab_size,
    )


def _free(name: str, taken: Sequence[str]) -> str:
    """`name`, or with a number behind it where an earlier stage's has it."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free
