"""Shares and win rates: by hand, against the normal interval, and how often the truth lies within."""

import math

import pytest
import torch

from framework.rollout.intervals import Z, share, win_rate


def test_without_ties_it_is_wilsons():
    """With z^2 = 3.8415: 0 of 10 gives 0 .. 3.8415 / 13.8415 = 0.2775; 5 of 10 is symmetric,
    0.5 -+ sqrt(3.8415 / 40 + 3.8415^2 / 400) / 1.38415 = 0.5 -+ 0.2634."""
    assert share(0, 10) == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert share(10, 0) == pytest.approx((1, 0.7225, 1), abs=1e-4)
    assert share(5, 5) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)


def test_a_win_rate_counts_ties_half_and_leaves_out_what_is_not_known():
    """Gaps +, 0, -, +, and two unknown: 2.5 of 4, a quarter tied. With s = z^2 / 4 = 0.96036 the centre is
    (0.625 + s / 2) / (1 + s) = 0.56377, the half width sqrt(s (0.9375 - 0.25 + 0.75 s)) / (2 (1 + s)) =
    0.29656; Wilson's own would be 0.34434."""
    ours = torch.tensor([1.0, 0.5, 0.0, 3.0, torch.nan, 1.0])
    theirs = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, torch.nan])
    assert win_rate(ours, theirs) == pytest.approx((0.625, 0.26720, 0.86033), abs=1e-4)


def test_infinities_are_compared_and_not_subtracted():
    best = torch.tensor([torch.inf, torch.inf, 0.0])
    assert win_rate(best, torch.tensor([torch.inf, 0.0, torch.inf])).value == 0.5


def test_ties_alone_are_certain_and_nothing_is_not():
    assert share(0, 0, 7) == (0.5, 0.5, 0.5)
    empty = win_rate(torch.full((2,), torch.nan), torch.zeros(2))
    assert math.isnan(empty.value)
    assert empty[1:] == (0.0, 1.0)


def test_for_many_pairs_it_is_the_normal_interval_of_their_mean():
    """Of 1 (3000 times), 1/2 (5000) and 0 (2000): variance 0.125 - 0.05^2 = 0.1225, deviation 0.35."""
    value, low, high = share(3000, 2000, 5000)
    assert value == 0.55
    assert (high - low) / 2 == pytest.approx(Z * 0.35 / 100, rel=1e-3)


def coverage(interval, n, win, tie):
    """Probability that the truth lies within, over all outcomes of n pairs."""
    truth, covered = win + tie / 2, 0.0
    for wins in range(n + 1):
        for ties in range(n + 1 - wins):
            losses = n - wins - ties
            ways = math.comb(n, wins) * math.comb(n - wins, ties)
            chance = ways * win**wins * tie**ties * (1 - win - tie) ** losses
            _, low, high = interval(wins, losses, ties)
            covered += chance * (low - 1e-12 <= truth <= high + 1e-12)
    return covered


def normal(wins, losses, ties):
    n = wins + losses + ties
    value = (wins + ties / 2) / n
    half = Z * math.sqrt(max(0.0, (wins + ties / 4) / n - value**2) / n)
    return value, value - half, value + half


def wilson_with_halves(wins, losses, ties):
    return share(wins + ties / 2, losses + ties / 2)


def test_it_holds_what_it_promises_where_the_others_do_not():
    """40 pairs, nearly all won or half of them tied: the normal interval is too narrow at the edge, Wilson's
    of wins and half ties too wide among ties."""
    sides = [(0.96, 0.0), (0.9, 0.05), (0.5, 0.0), (0.25, 0.5), (0.35, 0.5), (0.1, 0.8)]
    ours = [coverage(share, 40, *side) for side in sides]
    assert all(0.90 < covered < 0.985 for covered in ours), ours
    assert coverage(normal, 40, 0.96, 0.0) < 0.85
    assert coverage(wilson_with_halves, 40, 0.1, 0.8) > 0.995
