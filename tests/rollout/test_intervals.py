"""Shares and win rates: by hand, against the normal interval, and how often the truth lies within."""

import math

import pytest
import torch

from framework.rollout.intervals import Z, fall, questions_needed, share, win_rate


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


def test_a_fall_has_the_published_interval():
    """Airway reactivity of 21 children (Fagerland, Lydersen and Laake 2014): 1 changed sides one way, 7 the
    other, a difference of -0.286 with Tango's interval -0.517 to -0.026."""
    assert fall(7, 1, 21) == pytest.approx((6 / 21, 0.026, 0.517), abs=5e-4)
    assert fall(1, 7, 21) == pytest.approx((-6 / 21, -0.517, -0.026), abs=5e-4)


def test_where_nothing_is_gained_the_upper_end_is_wilsons():
    """q is 0 beyond lost / n then. Of none of 100 lost it is z^2 / (100 + z^2) = 0.036993."""
    for lost in (0, 1, 7, 40):
        assert fall(lost, 0, 100).high == pytest.approx(share(lost, 100 - lost).high, abs=1e-12)
    assert fall(0, 0, 100) == pytest.approx((0, -0.036993, 0.036993), abs=1e-6)


def test_the_ends_of_a_fall_are_those_of_the_likelihood():
    """q by search over the likelihood of the three counts, in place of the quadratic's root."""
    for lost, gained, n in ((5, 2, 40), (0, 3, 30), (12, 12, 50), (20, 0, 20)):
        _, low, high = fall(lost, gained, n)
        for d in (low, high):
            if abs(d) > 1 - 1e-9:
                continue
            rates = [max(0.0, -d) + (1 - abs(d)) / 2 * k / 20_000 for k in range(1, 20_000)]
            likeliest = max(
                rates,
                key=lambda q: (
                    lost * math.log(q + d)
                    + gained * math.log(q)
                    + (n - lost - gained) * math.log(max(1 - 2 * q - d, 1e-300))
                ),
            )
            z = (lost - gained - n * d) / math.sqrt(n * (2 * likeliest + d * (1 - d)))
            assert abs(z) == pytest.approx(Z, rel=1e-3)


def test_a_fall_lies_within_as_often_as_promised():
    """40 questions, from hardly any that change sides to a third; by all outcomes, not by chance."""
    for lost, gained in ((0.02, 0.0), (0.05, 0.01), (0.05, 0.05), (0.2, 0.1)):
        covered = 0.0
        for b in range(41):
            for c in range(41 - b):
                ways = math.comb(40, b) * math.comb(40 - b, c)
                chance = ways * lost**b * gained**c * (1 - lost - gained) ** (40 - b - c)
                if chance > 1e-9:
                    _, low, high = fall(b, c, 40)
                    covered += chance * (low <= lost - gained <= high)
        assert covered > 0.93, (lost, gained, covered)
    assert covered < 0.97  # of the last, where counts are large enough for it


def test_a_fall_of_everything_and_of_nothing():
    assert fall(5, 0, 5).high == 1.0
    assert fall(5, 0, 5).low > 0
    assert math.isnan(fall(0, 0, 0).value)
    assert fall(0, 0, 0)[1:] == (-1.0, 1.0)
    with pytest.raises(ValueError, match="3 lost and 2 gained of 4"):
        fall(3, 2, 4)


def test_so_many_questions_are_needed_and_no_fewer():
    """Without a loss z^2 (1 - budget) / budget: 380.3 for a hundredth."""
    assert questions_needed(0.01) == 381
    assert fall(0, 0, 381).high <= 0.01 < fall(0, 0, 380).high
    needed = questions_needed(0.05, lost=0.03, gained=0.01)
    assert fall(0.03 * needed, 0.01 * needed, needed).high <= 0.05
    assert fall(0.03 * (needed - 1), 0.01 * (needed - 1), needed - 1).high > 0.05
    with pytest.raises(ValueError, match="no number would do"):
        questions_needed(0.02, lost=0.05)
