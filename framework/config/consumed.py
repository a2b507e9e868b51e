"""What a run has consumed: of every step the rows that went into it, by place and content.

Nothing is written down for it while training. The stream of examples is a function of the seed and an index;
position and shares of replay lie in the checkpoint, and so do fingerprints of what was read, which is read
again and compared. So it costs nothing until somebody asks, and says the same of a run on any number of
ranks, stopped and resumed or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from framework.config import build, environment, selfmade, tabled
from framework.config.schema import Run
from framework.config.stage import ONLINE
from framework.data import rehearsed, sources
from framework.data.mixture import Mixture
from framework.errors import CheckpointError
from framework.strategy.world import Solo
from framework.track import jsonl


class Stretch(NamedTuple):
    """Examples start..stop-1 of a stream, which one step took."""

    step: int  # optimizer step, from 1; of questions to a policy the one before which they were answered
    term: str  # "" or "replay", where that is a loss of its own
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """One example of one step."""

    step: int  # as of a `Stretch`
    term: str
    source: str  # as in metrics
    place: str  # train.jsonl:17
    row: str  # hash of its content, by which replay.excluded leaves it out
    epoch: int  # times that it came before


class Ledger:
    """All rows of a run up to its newest checkpoint, in the order of the steps. Iterates over `Row`.

    `steps` are those up to there. `digest`, known when all rows were asked for, is of these and their order
    and not of where they stood: two runs with the same one consumed the same.

    Reads the run's data as the run did, so anything that has changed since is refused: raises UserError,
    and CheckpointError where there is no checkpoint or one of other data.
    """

    def __init__(self, run: Run) -> None:
        self._prepared = build.prepare(run)
        told = build.checkpointer(self._prepared, Solo(0, 1, 0, torch.device("cpu"))).told()
        if told is None:
            raise CheckpointError(
                f"{run.run_dir}: no checkpoint, so nothing says how far the run came; expected checkpoints/, "
                "where a run writes one at its end at the latest"
            )
        self.steps, self.digest = told.step, ""
        self._state = told.state["stage"]

    def __iter__(self) -> Iterator[Row]:
        digest = xxhash.xxh3_128()
        tables = (*self._prepared.tables, *self._prepared.replay)
        names = self._names()
        for stretch, places in self._taken():
            for source, row, epoch in places.T.tolist():
                table, name = tables[source], names[source][row]
                digest.update(f"{stretch.step} {stretch.term} {table.name} {name}\n".encode())
                yield Row(stretch.step, stretch.term, table.name, table.where(row), name, epoch)
        self.digest = digest.hexdigest()

    def _taken(self) -> Iterator[tuple[Stretch, np.ndarray]]:
        """(stretch, [3, its examples]: table, row, epoch), replay as a term of its own after each step's."""
        streams = [(0, self._mixture(), self._stretches())]
        if self._prepared.replay:
            apart = tabled.apart(self._prepared.replay, seed=self._prepared.run.seed)
            streams.append((len(self._prepared.tables), apart, self._rehearsed()))
        stretches = [(stretch, first, mixture) for first, mixture, each in streams for stretch in each]
        for stretch, first, mixture in sorted(stretches, key=lambda each: (each[0].step, each[0].term)):
            yield stretch, mixture.columns(stretch.start, stretch.stop) + np.array([[first], [0], [0]])

    def _names(self) -> list[Mapping[int, str]]:
        """Of each table, its rows that were taken -> their hashes."""
        prepared = self._prepared
        tables = (*prepared.tables, *prepared.replay)
        taken = [np.zeros(len(table), dtype=bool) for table in tables]
        for _, (numbers, rows, _) in self._taken():
            for number in np.unique(numbers):
                taken[number][rows[numbers == number]] = True
        replayed = selfmade.sources_of(prepared.run, prepared.description)
        given = [*environment.sources(prepared.run)[0], *replayed]
        return [
            rehearsed.named(table, sources.locate(sources.Source(**source.model_dump())), np.flatnonzero(of))
            for table, source, of in zip(tables, given, taken, strict=True)
        ]

    @property
    def _own(self) -> Mapping[str, Any]:
        """The state of the stage itself, without that of a term of replay."""
        inner: Mapping[str, Any] = self._state["stage"] if self._prepared.replay else self._state
        return inner

    def _mixture(self) -> Mixture:
        """What the stage learns from, with replay's shares as they were."""
        mixture = self._prepared.mixture
        if "shares" in self._own:
            mixture.restore([(int(start), float(share)) for start, share in self._own["shares"]])
        return mixture

    def _stretches(self) -> Iterator[Stretch]:
        """What each step took of the stage's own stream."""
        run = self._prepared.run
        if run.stage.name not in ONLINE:
            size = run.batch.sequences
            yield from (Stretch(s + 1, "", s * size, (s + 1) * size) for s in range(self.steps))
            return
        for line in jsonl.read(Path(run.run_dir) / "metrics.jsonl"):
            if line["kind"] == "rollout" and (stop := line["data_index"]) <= self._own["index"]:
                yield Stretch(line["step"] + 1, "", stop - line["prompts_drawn"], stop)

    def _rehearsed(self) -> Iterator[Stretch]:
        """What each step took of the stream of replay."""
        size = self._prepared.run.replay.sequences
        assert size is not None  # the schema: where replay is a term of its own
        return (Stretch(s + 1, "replay", s * size, (s + 1) * size) for s in range(self.steps))
