"""Cuts the examples of one optimizer step into micro-batches for every rank.

Pure functions of the examples' lengths, the token budget and the world size, so every rank computes the whole
plan and takes its own part. Letters: n examples, W ranks, M micro-batches of a rank.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

Bin = list[int]  # positions of examples; empty = a fill
Plan = list[list[Bin]]  # [W][M]


def plan(
    lengths: Sequence[int],
    *,
    tokens_per_micro: int,
    ranks: int,
    packing: bool,
    rows: Sequence[int] | None = None,
) -> Plan:
    """Every example in one micro-batch of one rank, the same number of micro-batches on each rank.

    `lengths` is [n] tokens. With `packing` a micro-batch holds at most `tokens_per_micro` tokens; without,
    its examples are of similar length and rows times longest is at most that. An example longer than the
    budget is alone in its micro-batch. The m-th micro-batches of all ranks are of similar size, since ranks
    wait for each other there. `rows` [n] says how many rows an example takes where they are padded, one
    each if left out; `lengths` are then those of its longest.
    """
    if not lengths:
        raise ValueError("no examples to cut into micro-batches")
    rows = rows if rows is not None else [1] * len(lengths)
    if packing:
        bins = _packed(lengths, tokens_per_micro, ranks)
    else:
        bins = _padded(lengths, rows, tokens_per_micro, ranks)
    cost = {id(b): cost_of([lengths[i] for i in b], packing, [rows[i] for i in b]) for b in bins}
    bins.sort(key=lambda b: (-cost[id(b)], b))
    for _ in range(-len(bins) % ranks):
        bins.append([])
    rounds = [bins[m : m + ranks] for m in range(0, len(bins), ranks)]
    # Every other round backwards: no rank always gets the largest.
    rounds = [r if m % 2 == 0 else r[::-1] for m, r in enumerate(rounds)]
    return [[r[rank] for r in rounds] for rank in range(ranks)]


def cost_of(lengths: Sequence[int], packing: bool, rows: Sequence[int] | None = None) -> int:
    """Tokens that a micro-batch of such examples computes, padding included; `rows` as in `plan`."""
    if not lengths:
        return 0
    return sum(lengths) if packing else max(lengths) * (len(lengths) if rows is None else sum(rows))


def _descending(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _packed(lengths: Sequence[int], budget: int, ranks: int) -> list[Bin]:
    """As few bins as best fit needs, rounded up to the ranks, then evened out if that fits."""
    best = _best_fit(lengths, budget)
    count = -(-len(best) // ranks) * ranks
    even = _evenly(lengths, budget, count)
    return [sorted(b) for b in (even if even is not None else best)]


def _best_fit(lengths: Sequence[int], budget: int) -> list[Bin]:
    """Best-fit decreasing: each example into the fullest bin that still holds it."""
    bins: list[Bin] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for i in _descending(lengths):
        at = bisect_left(rooms, (lengths[i], -1))
        if at < len(rooms):
            room, b = rooms.pop(at)
        else:
            room, b = max(budget, lengths[i]), len(bins)
            bins.append([])
        bins[b].append(i)
        insort(rooms, (room - lengths[i], b))
    return bins


def _evenly(lengths: Sequence[int], budget: int, count: int) -> list[Bin] | None:
    """Longest first into the emptiest of `count` bins; None when that breaks the budget."""
    bins: list[Bin] = [[] for _ in range(count)]
    loads = [(0, b) for b in range(count)]
    for i in _descending(lengths):
        load, b = heapq.heappop(loads)
        if load and load + lengths[i] > budget:
            return None
        bins[b].append(i)
        heapq.heappush(loads, (load + lengths[i], b))
    return [b for b in bins if b]


def _padded(lengths: Sequence[int], rows: Sequence[int], budget: int, ranks: int) -> list[Bin]:
    """Neighbours in order of length, then the costliest halved until every rank has as many."""

    def cost(b: Bin) -> int:
        return lengths[b[0]] * sum(rows[i] for i in b)  # the longest comes first

    bins: list[Bin] = []
    for i in _descending(lengths):
        if bins and cost([*bins[-1], i]) <= budget:
            bins[-1].append(i)
        else:
            bins.append([i])
    wanted = -(-len(bins) // ranks) * ranks
    while len(bins) < wanted:
        b = max(range(len(bins)), key=lambda b: (len(bins[b]) > 1, cost(bins[b]), -b))
        if len(bins[b]) == 1:
            break
        half = len(bins[b]) // 2
        bins[b : b + 1] = [bins[b][:half], bins[b][half:]]
    return bins
