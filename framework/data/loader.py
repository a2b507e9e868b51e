"""The examples of each optimizer step, as this rank's micro-batches. Its whole state is one integer.

Step s takes the next B examples of the mixture, whatever the world size, packing or strategy; every rank
plans the whole step from the examples' lengths and collates its own part. No collective, no worker, no queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from framework.batch import Batch
from framework.data import pack
from framework.data.collate import collate, fill
from framework.data.mixture import Mixture
from framework.data.tables import Table


class Step(NamedTuple):
    """One optimizer step on this rank."""

    micros: list[Batch]  # as many on every rank
    stats: Mapping[str, float]  # of the global step, alike on every rank


class Loader:
    """Steps of `sequences` examples from a mixture over `tables` (data.train first, then replay).

    `sequences` is B, global and per optimizer step; `tokens_per_micro` bounds a micro-batch as in
    `pack.plan`; `pad_id` fills padded rows and fills.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        mixture: Mixture,
        *,
        sequences: int,
        tokens_per_micro: int,
        packing: bool,
        rank: int,
        world_size: int,
        pad_id: int,
    ) -> None:
        self.tables = tables
        self.mixture = mixture
        self.sequences = sequences
        self.index = 0  # examples given so far, over all ranks
        self._tokens_per_micro = tokens_per_micro
        self._packing = packing
        self._rank, self._world_size = rank, world_size
        self._pad_id = pad_id

    def next(self) -> Step:
        """The next step's micro-batches and its global facts.

        `stats`: tokens, trained_tokens, sequences, micros (per rank), data_index and epoch (after the step),
        packing_efficiency (tokens over token budget), tokens/NAME and trained_tokens/NAME per source.
        """
        stop = self.index + self.sequences
        picks = self.mixture.picks(self.index, stop)
        where = [(pick.source, pick.row) for pick in picks]
        lengths = [int(self.tables[source].lengths[row]) for source, row in where]
        planned = pack.plan(
            lengths,
            tokens_per_micro=self._tokens_per_micro,
            ranks=self._world_size,
            packing=self._packing,
        )
        micros = [self._batch([where[i] for i in chosen]) for chosen in planned[self._rank]]
        stats = {
            **self._by_source(where),
            "sequences": float(len(picks)),
            "micros": float(len(micros)),
            "data_index": float(stop),
            "epoch": self.mixture.epochs(stop),
            "packing_efficiency": efficiency(lengths, planned, self._tokens_per_micro),
        }
        self.index = stop
        return Step(micros, stats)

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.index = int(state["index"])

    def _batch(self, where: Sequence[tuple[int, int]]) -> Batch:
        if not where:
            return fill(packing=self._packing, pad_id=self._pad_id)
        return collate(
            [self.tables[source].example(row) for source, row in where],
            [source for source, _ in where],
            packing=self._packing,
            pad_id=self._pad_id,
        )

    def _by_source(self, where: Sequence[tuple[int, int]]) -> dict[str, float]:
        tokens = dict.fromkeys((table.name for table in self.tables), 0.0)
        trained = dict(tokens)
        for source, row in where:
            table = self.tables[source]
            tokens[table.name] += float(table.lengths[row])
            trained[table.name] += float(table.trained[row])
        return {
            "tokens": sum(tokens.values()),
            "trained_tokens": sum(trained.values()),
            **{f"tokens/{name}": value for name, value in tokens.items()},
            **{f"trained_tokens/{name}": value for name, value in trained.items()},
        }


def efficiency(lengths: Sequence[int], planned: pack.Plan, tokens_per_micro: int) -> float:
    """Share of the token budget of all micro-batches that real tokens fill; fills count as empty."""
    micros = [[lengths[i] for i in chosen] for rank in planned for chosen in rank]
    return sum(map(sum, micros)) / sum(max([tokens_per_micro, *micro]) for micro in micros)


def held_out(
    table: Table,
    *,
    tokens_per_micro: int,
    packing: bool,
    rank: int,
    world_size: int,
    pad_id: int,
    source: int = 0,
    max_examples: int | None = None,
) -> list[Batch]:
    """This rank's batches of a pass over a table: every row once over all ranks, as many batches on each.

    `max_examples` keeps the table's first ones only.
    """
    lengths = [int(n) for n in table.lengths[:max_examples]]
    planned = pack.plan(lengths, tokens_per_micro=tokens_per_micro, ranks=world_size, packing=packing)
    return [
        collate([table.example(row) for row in rows], [source] * len(rows), packing=packing, pad_id=pad_id)
        if rows
        else fill(packing=packing, pad_id=pad_id)
        for rows in planned[rank]
    ]
