"""Which example comes at which place of the stream: a pure function of the seed and an index.

Knows only the size of each row, in trained tokens as a rule. Two groups share the stream: the data to learn,
and replay.
Letters: i index in the stream, j and k indices within a group, n rows of a source, f replay's share.

Within a group, without weights, an epoch is every row of the group exactly once, in an order keyed by
(seed, group, epoch). With weights, sources take turns by their virtual time (weighted fair queueing): the
k-th row of a source of share w is due at (k + 1/2) / w, so after j picks of S sources it has given j * w to
within (1 + w * S) / 2 picks; each source has epochs of its own.

Between the groups the share is counted in sizes and settled before anything is packed or spread over ranks:
the next example is a replayed one when replay has given less than f of all sizes so far.
So at every prefix replay is off by less than one example, also where the share was changed on the way:
what was owed under the old share is owed under the new one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from framework import keyed

BLOCK = 1 << 12  # examples of a group that are laid out at once
REMEMBERED = 8  # laid-out blocks kept; the rest is made again from its start


class Pick(NamedTuple):
    """One example of the stream."""

    source: int  # index into the tables: data.train first, then replay
    row: int
    epoch: int  # times this row came before


@dataclass(frozen=True)
class Group:
    """Sources that share one budget of the stream.

    `sizes[s]` is [n], what source s's rows count in replay's share: trained tokens, tokens, or 1. `weights`
    are shares of *rows*; None takes every row once per epoch, so sources count by their number of rows.
    """

    sizes: Sequence[np.ndarray]
    weights: Sequence[float] | None = None

    @property
    def rows(self) -> int:
        return sum(len(t) for t in self.sizes)


class Mixture:
    """The stream of examples of a run.

    `fraction` is replay's share of all sizes, in [0, 1): a number, or entries (from_index, share) with
    ascending indices from 0. `change` adds an entry while the stream is being read.
    """

    def __init__(
        self,
        train: Group,
        replay: Group | None = None,
        *,
        fraction: float | Sequence[tuple[int, float]] = 0.0,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self._train = _Stream(train, "train", seed, shuffle, first_source=0)
        self._replay = (
            None
            if replay is None
            else _Stream(replay, "replay", seed, shuffle, first_source=len(train.sizes))
        )
        self._lay_out = lru_cache(maxsize=REMEMBERED)(self._lay_out_block)
        self.restore([(0, float(fraction))] if isinstance(fraction, int | float) else fraction)

    @property
    def shares(self) -> list[tuple[int, float]]:
        """The entries so far: (from_index, share)."""
        return list(self._entries)

    def restore(self, shares: Sequence[tuple[int, float]]) -> None:
        """Lay the stream out by these entries from its first example on."""
        entries = [(int(start), float(share)) for start, share in shares]
        starts = [start for start, _ in entries]
        if not entries or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"fraction entries start at {starts}; expected ascending indices from 0")
        if any(not 0 <= share < 1 for _, share in entries):
            raise ValueError(f"replay shares {[share for _, share in entries]} must lie in [0, 1)")
        if self._replay is None and any(share > 0 for _, share in entries):
            raise ValueError("a replay share above 0 needs a replay group")
        self._entries = entries
        self._blocks: list[_Start] = [_Start(begin=0, entry=0)]
        self._lay_out.cache_clear()

    def change(self, index: int, share: float) -> None:
        """From example `index` on replay has `share`; what comes before `index` stays as it is.

        Raises ValueError for an index before the last change or a share outside [0, 1).
        """
        known = [entry for entry in self._entries if entry[0] < index]
        if len(known) < len(self._entries) - 1 or index < self._entries[-1][0]:
            raise ValueError(f"the share was last changed at {self._entries[-1][0]}, after {index}")
        blocks = [block for block in self._blocks if block.begin < index]
        self.restore([*known, (index, share)])
        self._blocks = blocks or self._blocks

    def picks(self, start: int, stop: int) -> list[Pick]:
        """Examples start..stop-1 of the stream."""
        return [Pick(*map(int, column)) for column in self.columns(start, stop).T]

    def columns(self, start: int, stop: int) -> np.ndarray:
        """[3, stop - start]: the same as source, row and epoch of each."""
        replayed, cursors = self._cursors(start, stop)
        sources = np.empty((3, stop - start), dtype=np.int64)
        sources[:, ~replayed] = self._train.take(cursors[~replayed])
        if self._replay is not None:
            sources[:, replayed] = self._replay.take(cursors[replayed])
        return sources

    def __getitem__(self, index: int) -> Pick:
        return self.picks(index, index + 1)[0]

    def epochs(self, index: int) -> float:
        """Epochs of `data.train` in the first `index` examples; with weights, its picks over its rows."""
        if index == 0:
            return 0.0
        replayed, cursors = self._cursors(index - 1, index)
        if not replayed[0]:
            return (int(cursors[0]) + 1) / self._train.rows
        block = self._block_of(index - 1)
        start, (order, _) = self._blocks[block], self._lay_out(block)
        before = start.train + int(np.count_nonzero(~order[: index - start.begin]))
        return before / self._train.rows

    def examples_for(self, epochs: float) -> int:
        """Length of the stream that holds `epochs` of `data.train`, with the replay that comes between."""
        wanted = int(np.ceil(epochs * self._train.rows))
        if wanted <= 0:
            raise ValueError(f"epochs={epochs} must be positive")
        return self.examples_with(wanted)

    def examples_with(self, wanted: int) -> int:
        """Length of the stream that holds `wanted` examples of `data.train`, with the replay between."""
        block = 0
        while True:
            self._extend(block)
            start, (order, _) = self._blocks[block], self._lay_out(block)
            if self._blocks[block + 1].train >= wanted:
                at = np.flatnonzero(~order)[wanted - start.train - 1]
                return start.begin + int(at) + 1
            block += 1

    def steps_for(self, epochs: float, sequences: int) -> int:
        """Optimizer steps of `sequences` examples that cover `epochs` of `data.train` and its replay.

        Rounded up: every row is seen at least that often, and the last step runs into the next epoch by
        less than `sequences` examples.
        """
        return -(-self.examples_for(epochs) // sequences)

    def _cursors(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """For each index: whether it is replayed, and its index within its group."""
        replayed, cursors = [], []
        while start < stop:
            block = self._block_of(start)
            order, within = self._lay_out(block)
            begin = start - self._blocks[block].begin
            end = min(len(order), stop - self._blocks[block].begin)
            replayed.append(order[begin:end])
            cursors.append(within[begin:end])
            start += end - begin
        return np.concatenate(replayed), np.concatenate(cursors)

    def _block_of(self, index: int) -> int:
        while self._blocks[-1].begin <= index:
            self._extend(len(self._blocks) - 1)
        return bisect_right(self._blocks, index, key=lambda start: start.begin) - 1

    def _extend(self, block: int) -> None:
        """Make sure that the start of the block after this one is known."""
        if block + 1 == len(self._blocks):
            self._lay_out(block)

    def _lay_out_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of one block and its cursors; notes where the next block starts.

        Replay is due when f * (sizes of both) > sizes of replay, that is f * train > (1 - f) * replay; what
        earlier entries owe adds to the left. So example j of the training data comes at that plus f * (the
        sizes before it), example k of replay at (1 - f) * (the sizes before it), and laying out is merging
        two ascending lists; ties to training.
        """
        start = self._blocks[block]
        share = self._entries[start.entry][1]
        until = self._entries[start.entry + 1][0] if start.entry + 1 < len(self._entries) else None
        train = self._train.sizes(start.train, start.train + BLOCK)
        train_due = start.owed + share * (start.train_given + _before(train))
        if share == 0.0 or self._replay is None:
            replay, replay_due = np.empty(0, dtype=np.int64), np.empty(0)
        else:
            replay = self._replay.sizes(start.replay, start.replay + BLOCK)
            replay_due = (1 - share) * (start.replay_given + _before(replay))
            # Only what is due before the first example that was not looked at is decided.
            train_due = train_due[train_due <= replay_due[-1]]
            replay_due = replay_due[replay_due < (train_due[-1] if len(train_due) else np.inf)]
        due = np.concatenate([train_due, replay_due])
        order = np.argsort(due, kind="stable")  # stable: training comes first where both are due
        if until is not None:
            order = order[: until - start.begin]
        replayed = order >= len(train_due)
        cursors = np.where(replayed, order - len(train_due) + start.replay, order + start.train)
        if block + 1 == len(self._blocks):
            self._blocks.append(self._after(start, replayed, train, replay, until))
        return replayed, cursors

    def _after(
        self, start: _Start, replayed: np.ndarray, train: np.ndarray, replay: np.ndarray, until: int | None
    ) -> _Start:
        from_replay = int(np.count_nonzero(replayed))
        from_train = len(replayed) - from_replay
        ended = start.begin + len(replayed) == until
        given = start.train_given + int(train[:from_train].sum())
        rehearsed = start.replay_given + int(replay[:from_replay].sum())
        share = self._entries[start.entry][1]
        return _Start(
            begin=start.begin + len(replayed),
            entry=start.entry + ended,
            train=start.train + from_train,
            replay=start.replay + from_replay,
            train_given=0 if ended else given,
            replay_given=0 if ended else rehearsed,
            owed=start.owed + (share * given - (1 - share) * rehearsed if ended else 0.0),
        )


class _Start(NamedTuple):
    """Where a block of the stream begins: cursors, and the sizes given since the entry began."""

    begin: int
    entry: int
    train: int = 0
    replay: int = 0
    train_given: int = 0
    replay_given: int = 0
    owed: float = 0.0  # of replay that earlier entries have not given yet; below 0: given too many


def _before(sizes: np.ndarray) -> np.ndarray:
    """Sums of what comes before each element."""
    return np.cumsum(sizes) - sizes


class _Stream:
    """The endless stream of one group."""

    def __init__(self, group: Group, name: str, seed: int, shuffle: bool, *, first_source: int) -> None:
        self._sizes = [np.asarray(t, dtype=np.int64) for t in group.sizes]
        counts = [len(t) for t in self._sizes]
        if not counts or min(counts) == 0 or min(int(t.min()) for t in self._sizes) < 1:
            raise ValueError(f"{name}: every source needs rows, and every row a trained token")
        self.rows = sum(counts)
        self._name, self._seed, self._shuffle, self._first_source = name, seed, shuffle, first_source
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        self._shares: np.ndarray | None = None
        if group.weights is not None:
            weights = np.asarray(group.weights, dtype=np.float64)
            if len(weights) != len(counts) or not (weights > 0).all():
                raise ValueError(
                    f"{name}: {len(counts)} sources need as many positive weights, not {group.weights}"
                )
            self._shares = weights / weights.sum()
        self._order = lru_cache(maxsize=2 * len(counts) + 2)(self._order_of)

    def sizes(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] sizes of the stream's examples."""
        source, row, _ = self.take(np.arange(start, stop))
        found = np.empty(len(row), dtype=np.int64)
        for s, sizes in enumerate(self._sizes):
            chosen = source == s + self._first_source
            found[chosen] = sizes[row[chosen]]
        return found

    def take(self, at: np.ndarray) -> np.ndarray:
        """[3, len(at)]: source, row and epoch at ascending indices `at`."""
        picks = np.empty((3, len(at)), dtype=np.int64)
        if len(at) == 0:
            return picks
        if self._shares is None:
            place = self._rows(-1, self.rows, at)
            picks[0] = np.searchsorted(self._offsets, place, side="right") - 1
            picks[1] = place - self._offsets[picks[0]]
            picks[2] = at // self.rows
        else:
            begin = int(at[0])
            turn_source, turn = self._turns(begin, int(at[-1]) + 1)
            picks[0], nth = turn_source[at - begin], turn[at - begin]
            for s, sizes in enumerate(self._sizes):
                chosen = picks[0] == s
                picks[1, chosen] = self._rows(s, len(sizes), nth[chosen])
                picks[2, chosen] = nth[chosen] // len(sizes)
        picks[0] += self._first_source
        return picks

    def _turns(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """For turns start..stop-1: whose turn it is and how many turns that source had before.

        With S sources, after j turns a source has had between j * w - S/2 - 1 and j * w + S/2 + 1 of
        them, so it is enough to sort the due times in that window.
        """
        assert self._shares is not None
        slack = len(self._shares) / 2 + 1
        sources, turns, skipped = [], [], 0
        for s, share in enumerate(self._shares):
            low = max(0, int(np.floor(start * share - slack)))
            window = np.arange(low, int(np.ceil(stop * share + slack)) + 1)
            skipped += low
            turns.append(window)
            sources.append(np.full(len(window), s))
        source, turn = np.concatenate(sources), np.concatenate(turns)
        order = np.lexsort((source, (turn + 0.5) / self._shares[source]))[start - skipped : stop - skipped]
        return source[order], turn[order]

    def _rows(self, source: int, rows: int, at: np.ndarray) -> np.ndarray:
        """Rows at ascending indices `at` of the endless sequence of epochs over `rows` rows."""
        if not self._shuffle:
            return at % rows
        if len(at) == 0:
            return at
        edges = np.arange(at[0] // rows + 1, at[-1] // rows + 1) * rows  # first index of each later epoch
        parts = np.split(at, np.searchsorted(at, edges))
        return np.concatenate(
            [self._order(source, rows, int(p[0]) // rows)[p % rows] for p in parts if len(p)]
        )

    def _order_of(self, source: int, rows: int, epoch: int) -> np.ndarray:
        """A permutation of rows. From raw Philox words, which unlike numpy's `permutation` never change."""
        words = np.random.Philox(key=keyed.key(self._seed, "shuffle", self._name, source, epoch)).random_raw(
            rows
        )
        return np.argsort(words, kind="stable")
