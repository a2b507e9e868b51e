"""Back towards the start weights, as little as a budget of forgetting asks: (1 - x) start + x tuned.

Averaging weights (Wortsman et al. 2022, WiSE-FT, arXiv 2109.01903) gives up some of what was learnt for much
of what was forgotten. x = 1 is the tuned model, x = 0 the start, both bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from framework.strategy.base import Engine
from framework.train.protect import Kept, Values, copied, put

GRID = tuple(part / 10 for part in range(10, -1, -1))  # where the curve is drawn
HALVINGS = 4  # after that the largest x is known to 1 / 160


class Line:
    """The way from the start weights to the tuned ones, which `engine` holds when this is made.

    `start` was copied before training. Where `moves` says no to a parameter it stays as it was tuned. Bytes
    for each trained element of a rank, in the memory of the host: 4, besides 4 of `start`.
    """

    def __init__(self, engine: Engine, start: Values, moves: Callable[[str], bool]) -> None:
        self._engine = engine
        self._start = {name: parts for name, parts in start.items() if moves(name)}
        self._tuned = copied(engine, device=torch.device("cpu"))

    def go(self, x: float) -> None:
        """Put the weights at `x` of the way. Collective."""
        put(self._engine, {n: self._between(n, parts, x) for n, parts in self._start.items()})

    def _between(self, name: str, starts: Sequence[Kept], x: float) -> list[Kept]:
        pairs = zip(starts, self._tuned[name], strict=True)
        return [Kept(start.start, between(start.values, tuned.values, x)) for start, tuned in pairs]


def between(start: Tensor, tuned: Tensor, x: float) -> Tensor:
    """(1 - x) start + x tuned, exact at both ends: measured from the nearer one."""
    base, share = (start, x) if x < 0.5 else (tuned, x - 1.0)
    return (tuned - start).mul_(share).add_(base)


def largest(keeps: Callable[[float], bool]) -> float | None:
    """The largest x up to 1 that keeps, on a grid and then by halving; None where no x above 0 does.

    Every point of the grid is asked for, from 1 down, so that a curve can be drawn. The answer was asked for
    itself, so it keeps even where what keeps is no interval.
    """
    kept = [keeps(x) for x in GRID]
    if kept[0]:
        return 1.0
    first = kept.index(True) if any(kept) else len(GRID) - 1  # the start itself keeps what it knows
    best, over = GRID[first], GRID[first - 1]
    for _ in range(HALVINGS):
        middle = (best + over) / 2
        if keeps(middle):
            best = middle
        else:
            over = middle
    return best if best > 0 else None
