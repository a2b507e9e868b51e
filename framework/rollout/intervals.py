"""Shares of what was counted and how far they can be trusted: one home for accuracies and win rates.

Knows no model and no task. Letters: N pairs, n of them counted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

Z = 1.959964  # quantile 0.975 of the normal distribution: two-sided 95 %


class Share(NamedTuple):
    """A share from 0 to 1 with its 95 % interval."""

    value: float  # NaN where nothing was counted; anything is possible then
    low: float
    high: float


def share(wins: int, losses: int, ties: int = 0) -> Share:
    """Wins, ties half, of n = wins + losses + ties that were counted, each by itself.

    The interval is Wilson's (1927) with the share of ties t taken as seen: all rates m with
    |value - m| <= Z sqrt((m (1 - m) - t / 4) / n). Without ties it is Wilson's own, which stays honest where
    all or none are won and the normal interval of the mean shrinks to a point. With ties it is narrower by
    what a tie varies less than a win or a loss, and for large n it is the normal interval of the mean of
    1, 1/2 and 0, which is what pairs are owed.
    """
    n = wins + losses + ties
    if n == 0:
        return Share(math.nan, 0.0, 1.0)
    value, tied, spread = (wins + ties / 2) / n, ties / n, Z * Z / n
    centre = value + (0.5 - value) * spread / (1 + spread)
    under = spread * (4 * value * (1 - value) - tied + spread * (1 - tied))  # >= spread * tied * (1 - tied)
    half = math.sqrt(max(0.0, under)) / (2 * (1 + spread))
    return Share(value, max(0.0, centre - half), min(1.0, centre + half))


def win_rate(ours: Tensor, theirs: Tensor) -> Share:
    """How often the first of two answers to one question scores higher, ties half.

    Scores [N] of answers to the same questions in the same order; higher is better. Pairs with a NaN, an
    answer that could not be judged, are left out.
    """
    known = ~(ours.isnan() | theirs.isnan())
    wins, losses = int((ours > theirs)[known].sum()), int((ours < theirs)[known].sum())
    return share(wins, losses, int(known.sum()) - wins - losses)
