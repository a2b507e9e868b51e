"""The examples of each optimizer step, as this rank's micro-batches.

Its whole state is one integer, and where replay's share was changed on the way, the changes.

Step s takes the next B examples of the mixture, whatever the world size, packing or strategy; every rank
plans the whole step from the examples' lengths and collates its own part. No collective, no worker, no queue.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from framework.batch import Batch
from framework.data import pack
from framework.data.collate import Example, Extent, Kind, Supervised, Where
from framework.data.mixture import Mixture
from framework.data.tables import Table

SUPERVISED = Supervised()

Rewrite = Callable[[int, Sequence[tuple[int, Example]]], Mapping[int, Example]]
"""(index of the first, a step's examples with their tables) -> those to take in place of some of them."""


class Step(NamedTuple):
    """One optimizer step on this rank."""

    micros: Sequence[Any]  # as many on every rank; Batch or what the loader's kind collates
    stats: Mapping[str, float]  # of the global step, alike on every rank
    mismatched: Sequence[Any] = ()  # of the loader's second kind, likewise


class Loader:
    """Steps of `sequences` examples from a mixture over `tables` (data.train first, then replay).

    `sequences` is B, global and per optimizer step; `tokens_per_micro` bounds a micro-batch as in
    `pack.plan`; `pad_id` fills padded rows and fills. `kind` says what the tables' examples become;
    `mismatched`, another one, makes further micro-batches of the same step.
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
        kind: Kind = SUPERVISED,
        mismatched: Kind | None = None,
    ) -> None:
        self.tables = tables
        self.mixture = mixture
        self.sequences = sequences
        self.index = 0  # examples given so far, over all ranks
        self.kind = kind
        self.mismatched = mismatched
        self._changed = False
        self._cut = Cut(tokens_per_micro, packing, rank, world_size, pad_id)

    def next(self, rewrite: Rewrite | None = None) -> Step:
        """The next step's micro-batches and its global facts; of supervised data, as `rewrite` leaves it.

        `stats`: tokens, sequences, micros (per rank), data_index and epoch (after the step),
        packing_efficiency (tokens over token budget), and what the kind counts: trained_tokens, and for
        judged answers pairs, chosen_tokens or desirable. Sequences, tokens and what the kind counts come per
        source, too, such as tokens/NAME.
        """
        stop = self.index + self.sequences
        where = [(pick.source, pick.row) for pick in self.mixture.picks(self.index, stop)]
        if rewrite is None:
            step = self._cut.step(self.tables, where, self.kind, self.mismatched)
        else:
            step = self._rewritten(where, rewrite)
        stats = {**step.stats, "data_index": float(stop), "epoch": self.mixture.epochs(stop)}
        self.index = stop
        return step._replace(stats=stats)

    def _rewritten(self, where: Where, rewrite: Rewrite) -> Step:
        examples = [(source, self.tables[source].example(row)) for source, row in where]
        instead = rewrite(self.index, examples)
        taken = {at: instead.get(at, example) for at, (_, example) in enumerate(examples)}
        tables: Any = [_Taken.of(table.name, taken) for table in self.tables]
        places = [(source, at) for at, (source, _) in enumerate(examples)]
        return self._cut.step(tables, places, self.kind, None)

    def change_share(self, share: float) -> None:
        """From the next step on replay has `share` of the trained tokens."""
        self.mixture.change(self.index, share)
        self._changed = True

    def state_dict(self) -> dict[str, Any]:
        shares = [list(entry) for entry in self.mixture.shares]
        return {"index": self.index, "shares": shares} if self._changed else {"index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.index = int(state["index"])
        if "shares" in state:
            self.mixture.restore([(int(start), float(share)) for start, share in state["shares"]])
            self._changed = True


@dataclass(frozen=True)
class _Taken:
    """The examples of one step in place of a table, by their place in the step."""

    name: str
    lengths: Mapping[int, int]
    trained: Mapping[int, int]
    _examples: Mapping[int, Example]

    @classmethod
    def of(cls, name: str, examples: Mapping[int, Example]) -> _Taken:
        lengths = {at: len(ids) for at, (ids, _) in examples.items()}
        trained = {at: int(learnt.sum()) for at, (_, learnt) in examples.items()}
        return cls(name, lengths, trained, examples)

    def example(self, at: int) -> Example:
        return self._examples[at]


class Cut(NamedTuple):
    """How examples become this rank's micro-batches."""

    tokens_per_micro: int
    packing: bool
    rank: int
    world_size: int
    pad_id: int

    def step(self, tables: Sequence[Table], where: Where, kind: Kind, mismatched: Kind | None) -> Step:
        """This rank's part of the examples `where`, and the facts of all of them."""
        micros, extents, planned = self._micros(tables, where, kind)
        stats = {
            **_facts(tables, where, kind, extents),
            "micros": float(len(micros)),
            "packing_efficiency": efficiency([e.tokens for e in extents], planned, self.tokens_per_micro),
        }
        if mismatched is None:
            return Step(micros, stats)
        return Step(micros, stats, self._micros(tables, where, mismatched)[0])

    def _micros(
        self, tables: Sequence[Table], where: Where, kind: Kind
    ) -> tuple[list[Batch], list[Extent], pack.Plan]:
        extents = [kind.extent(tables, where, i, packing=self.packing) for i in range(len(where))]
        planned = plan(
            extents, tokens_per_micro=self.tokens_per_micro, ranks=self.world_size, packing=self.packing
        )
        micros = [
            kind.collate(tables, where, chosen, packing=self.packing, pad_id=self.pad_id)
            for chosen in planned[self.rank]
        ]
        return micros, extents, planned


def plan(extents: Sequence[Extent], *, tokens_per_micro: int, ranks: int, packing: bool) -> pack.Plan:
    """`pack.plan` of examples that take `extents`."""
    return pack.plan(
        [extent.tokens if packing else extent.longest for extent in extents],
        rows=[extent.rows for extent in extents],
        tokens_per_micro=tokens_per_micro,
        ranks=ranks,
        packing=packing,
    )


def _facts(tables: Sequence[Table], where: Where, kind: Kind, extents: Sequence[Extent]) -> dict[str, float]:
    """Sums over all examples, and over those of each table under NAME/TABLE."""
    total: defaultdict[str, float] = defaultdict(float)
    for (source, row), extent in zip(where, extents, strict=True):
        counted = {"tokens": float(extent.tokens), "sequences": 1.0, **kind.facts(tables, source, row)}
        for name, value in counted.items():
            total[name] += value
            total[f"{name}/{tables[source].name}"] += value
    names = [name for name in total if "/" not in name]
    return {**total, **{f"{n}/{t.name}": total.get(f"{n}/{t.name}", 0.0) for n in names for t in tables}}


def efficiency(tokens: Sequence[int], planned: pack.Plan, tokens_per_micro: int) -> float:
    """Share of the token budget of all micro-batches that real tokens fill; fills count as empty."""
    micros = [[tokens[i] for i in chosen] for rank in planned for chosen in rank]
    return sum(map(sum, micros)) / sum(max([tokens_per_micro, *micro]) for micro in micros)


def held_out(
    table: Table,
    *,
    tokens_per_micro: int,
    packing: bool,
    rank: int,
    world_size: int,
    pad_id: int,
    max_examples: int | None = None,
    kind: Kind = SUPERVISED,
) -> list[Any]:
    """This rank's batches of a pass over a table: every row once over all ranks, as many batches on each.

    `max_examples` keeps the table's first ones only.
    """
    cut = Cut(tokens_per_micro, packing, rank, world_size, pad_id)
    return list(whole(table, cut, kind=kind, max_examples=max_examples).micros)


def whole(
    table: Table, cut: Cut, *, kind: Kind, mismatched: Kind | None = None, max_examples: int | None = None
) -> Step:
    """All rows of a table, or its first `max_examples`, as one step; see `held_out`."""
    where = [(0, row) for row in range(len(table.lengths[:max_examples]))]
    return cut.step([table], where, kind, mismatched)
