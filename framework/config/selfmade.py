"""General text that a start model writes, as files: found in the cache, or written before training begins.

The first process of a start that needs it writes it, in processes of its own, so that nothing of the model
stays in memory; the others are told the file, as with environments (`config.environment`). What is handed out
stands in the cache under its own content, beside a note of where it comes from, and is a source like any
other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import framework
from framework.config import drafts, making
from framework.config.drafts import Planned
from framework.config.journal import Journal
from framework.config.nodes import Source
from framework.config.schema import Run
from framework.config.synthesis import SELF, Order
from framework.config.written import replace, written
from framework.data import cache, reading
from framework.data.leaks import normalised
from framework.errors import DataError, SapwoodError
from framework.models.load import Description
from framework.strategy.world import Solo

NAME = "self"  # of the source, where it is given none
WATCHED = "watched"  # why a row is left out: a probe of the run has it


@dataclass(frozen=True)
class Made:
    """A file of rows and what it took."""

    path: Path
    rows: int
    notes: Mapping[str, Any]  # what stands beside it

    def told(self) -> str:
        """For people."""
        parts = []
        for kind, stream in self.notes["streams"].items():
            out = ", ".join(f"{count} {reason}" for reason, count in sorted(stream["dropped"].items()))
            parts.append(
                f"{kind} {stream['rows']} rows of {stream['tried']} tried" + (f" ({out})" if out else "")
            )
        return (
            f"{self.path}: {self.rows} rows in the words of {self.notes['model']['path']}: {'; '.join(parts)}"
        )

    def copied(self, where: Path) -> Path:
        """The same file and its note elsewhere."""
        for path, to in ((self.path, where), (_notes_of(self.path), _notes_of(where))):
            replace(to, path.read_bytes())
        return where


def _notes_of(path: Path) -> Path:
    return path.with_suffix(".notes.json")


def sources_of(run: Run, description: Description) -> tuple[Source, ...]:
    """`replay.sources` with what the start model writes in the place of `self:`.

    Writes it where the cache has too little of it. Raises UserError where that cannot be done.
    """
    found = []
    for source in run.replay.sources:
        if source.path == SELF:
            if SELF not in run._rows:
                made = make(order_of(run), description, without=watched(run))
                print(made.told(), file=sys.stderr)
                run._rows[SELF] = str(made.path)
            source = source.model_copy(update={"path": run._rows[SELF], "name": source.name or NAME})
        found.append(source)
    return tuple(found)


def order_of(run: Run) -> Order:
    """What a run asks of its start model."""
    return Order(
        model=run.model,
        synthesis=run.synthesis,
        precision=run.precision,
        max_length=run.data.max_length,
        cache_dir=run.data.cache_dir,
        launch=run.launch,
        part="train",
        refresh=(),
        score=None,
        trusted_packages=run.trusted_packages,
    )


def watched(run: Run) -> frozenset[str]:
    """What the run's own probes say: text on which forgetting is measured is not trained on."""
    return texts(run.evaluate.retention)


def texts(given: Iterable[Source]) -> frozenset[str]:
    """All that is said in some sources, row by row, `normalised`."""
    found = (record for source in given for _, record in reading.records(drafts.as_source(source)))
    return frozenset(normalised(reading.said(record)) for record in found)


def make(order: Order, description: Description, *, without: frozenset[str] = frozenset()) -> Made:
    """The rows of an order, from the cache as far as they are there. Raises UserError.

    `without` are texts, `normalised`, that no row may say.
    """
    plans = drafts.plans(order, description)
    where = making.home(order)
    where.mkdir(parents=True, exist_ok=True)
    with cache.locked(where / f"{cache.fingerprint({'streams': sorted(p.key for p in plans)})}.lock"):
        journals = _journals(plans, where)
        if not all(making.enough(plan, journal) for plan, journal in zip(plans, journals, strict=True)):
            _write(order, where)
            journals = _journals(plans, where)
    for plan, journal in zip(plans, journals, strict=True):
        _check(order, plan, journal)
    return _composed(order, description, plans, journals, where, without)


def _journals(plans: Sequence[Planned], where: Path) -> list[Journal]:
    return [Journal(where / f"{plan.key}.jsonl") for plan in plans]


def _write(order: Order, where: Path) -> None:
    """Have the streams written, by as many processes as the run will have on this machine."""
    import torch

    options = order.launch
    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    print(f"{order.model.path} writes general text of its own, kept in {where}", file=sys.stderr)
    if on_cpu and options.nproc == 1:  # nothing but memory to give back
        making.make(order, Solo(0, 1, 0, torch.device("cpu")))
        return
    from framework.cluster import gang

    root = str(Path(framework.__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory(prefix="sapwood-") as temporary:
        handed = Path(temporary) / "order.json"
        handed.write_text(order.model_dump_json(by_alias=True))
        stopped = gang.launch(
            [sys.executable, "-m", making.__name__, str(handed)],
            nproc=options.nproc,
            log_dir=where / "logs",
            run_id="self",
            threads=options.threads,
            grace_s=options.grace_s,
            timeout_s=options.timeout_s,
            environment={
                "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            },
        )
    if stopped is not None:
        print(
            "stopped while the start model was writing; the same command goes on from there", file=sys.stderr
        )
        sys.exit(128 + signal.Signals(stopped))


def _check(order: Order, plan: Planned, journal: Journal) -> None:
    """Refuse a stream that did not give what was wanted."""
    if making.enough(plan, journal):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in journal.dropped.most_common())
    possible = len(journal.rows) * order.synthesis.rows // plan.rows
    raise DataError(
        f"{plan.kind}: {order.model.path} wrote {len(journal.rows)} rows of use in {journal.tried} tries; "
        f"expected {plan.rows}; left out: {reasons or 'nothing'}; "
        + (f"type synthesis.rows={possible}, or " if possible else "")
        + f"give answers more room: synthesis.max_new_tokens={2 * order.synthesis.max_new_tokens}, or other "
        "requests: synthesis.prompts=FILE.jsonl"
    )


def _composed(
    order: Order,
    description: Description,
    plans: Sequence[Planned],
    journals: Sequence[Journal],
    where: Path,
    without: frozenset[str],
) -> Made:
    """The file of the rows that are wanted, streams in turn, and a note beside it."""
    rows: list[Mapping[str, Any]] = []
    streams = {}
    for plan, journal in zip(plans, journals, strict=True):
        taken = journal.rows[: plan.rows]
        kept = [row for row in taken if not (without and normalised(making.said(row)) in without)]
        left = journal.dropped + Counter({WATCHED: len(taken) - len(kept)})
        streams[plan.kind] = {
            "rows": len(kept),
            "tried": journal.tried,
            "dropped": dict(left),
            "stream": plan.key,
        }
        rows += kept
    if not rows:
        raise DataError(f"{order.model.path} wrote no row that the run's probes do not have, too")
    path = written(rows, where, NAME)
    notes = {
        "model": {"path": order.model.path, "fingerprint": description.fingerprint},
        "settings": order.model_dump(
            mode="json",
            by_alias=True,
            include={"synthesis", "precision", "max_length", "part", "refresh", "score"},
        ),
        "streams": streams,
    }
    replace(_notes_of(path), json.dumps(notes, ensure_ascii=False, indent=1).encode())
    return Made(path, len(rows), notes)


def packed(run: Run) -> dict[str, str] | None:
    """What the start model has written for `run`, for machines that do not share this one's cache."""
    if SELF not in run._rows:
        return None
    path = Path(run._rows[SELF])
    return {"name": path.name, "text": path.read_text(encoding="utf-8")}


def unpack(run: Run, told: Mapping[str, str] | None) -> None:
    """Take what another machine has `packed`: it stands in this one's cache then."""
    if told is None or SELF in run._rows:
        return
    path = making.home(order_of(run)) / told["name"]
    if path.name != told["name"] or Path(told["name"]).name != told["name"]:
        raise SapwoodError(f"{told['name']}: no name of a file")
    if not path.is_file():
        replace(path, told["text"].encode())
    run._rows[SELF] = str(path)
