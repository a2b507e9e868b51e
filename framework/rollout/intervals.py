"""Shares of what was counted and how far they can be trusted: one home for accuracies and win rates.

Knows no model and no task. Letters: N pairs, n of them counted; of shares that fell, d the fall.
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


def fall(lost: float, gained: float, n: float) -> Share:
    """By how much the share of the same n answered right has fallen, with its 95 % interval.

    `lost` were right before and are wrong now, `gained` the other way round; the value is
    (lost - gained) / n, from -1 to 1, NaN of n = 0. The interval is Tango's (1998, Statistics in Medicine 17,
    891-908): all falls d with |lost - gained - n d| <= Z sqrt(n (2 q + d (1 - d))), where q, the likeliest
    rate of gaining for that d, solves
    2 n q^2 + (2 n d - lost (1 + d) - gained (1 - d)) q - gained d (1 - d) = 0. It stays honest where nothing
    changed sides: then it ends at Z^2 / (n + Z^2). Raises ValueError for counts that n does not hold.
    """
    if min(lost, gained) < 0 or lost + gained > n:
        raise ValueError(f"{lost} lost and {gained} gained of {n}; expected at most all of them")
    if n == 0:
        return Share(math.nan, -1.0, 1.0)
    return Share((lost - gained) / n, -_furthest(gained, lost, n), _furthest(lost, gained, n))


def questions_needed(budget: float, lost: float = 0.0, gained: float = 0.0) -> int:
    """The least n for which the upper end of `fall` is within `budget`, a share in (0, 1).

    `lost` and `gained` are the shares that are expected to change sides; without any it is what a model that
    loses nothing needs. Raises ValueError where the fall itself is not below the budget.
    """
    if not 0 < budget < 1 or lost - gained >= budget:
        raise ValueError(f"a budget of {budget} for a fall of {lost - gained}: no number would do")

    def enough(n: int) -> bool:
        return fall(lost * n, gained * n, n).high <= budget

    above = 1
    while not enough(above):
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if enough(middle) else (middle, above)
    return above


def _furthest(lost: float, gained: float, n: float) -> float:
    """The upper end of `fall`, by halving: to the last digit, and alike everywhere."""
    low, high = (lost - gained) / n, 1.0
    for _ in range(60):
        d = (low + high) / 2
        linear = 2 * n * d - lost * (1 + d) - gained * (1 - d)
        q = (math.sqrt(max(0.0, linear**2 + 8 * n * gained * d * (1 - d))) - linear) / (4 * n)
        spread = math.sqrt(max(0.0, n * (2 * q + d * (1 - d))))
        low, high = (low, d) if n * d - (lost - gained) > Z * spread else (d, high)
    return high
