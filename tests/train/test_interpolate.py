"""The way back to the start weights: exact at its ends, and walked no further than a budget asks."""

import pytest
import torch

from framework.train.interpolate import GRID, between, largest


def test_between_is_the_weighted_mean():
    start, tuned = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    assert between(start, tuned, 0.25).tolist() == [1.5, -1.0]
    assert between(start, tuned, 0.75).tolist() == [2.5, 1.0]


def test_both_ends_are_there_bit_for_bit():
    """0.1 + (1e8 - 0.1) is not 1e8 in fp32, so each half is measured from its own end."""
    start, tuned = torch.tensor([0.1, 1e8, 3e-8]), torch.tensor([1e8, 0.1, -7.0])
    assert torch.equal(between(start, tuned, 0.0), start)
    assert torch.equal(between(start, tuned, 1.0), tuned)


@pytest.mark.parametrize("limit", [0.011, 0.0625, 0.3, 0.637, 0.95, 0.999])
def test_the_largest_that_keeps_is_found_to_a_sixteenth_of_the_grid(limit):
    asked = []

    def keeps(x):
        asked.append(x)
        return x <= limit

    found = largest(keeps)
    assert found <= limit < found + 0.1 / 16 + 1e-12
    assert found in asked
    assert set(GRID) <= set(asked)  # a curve can be drawn
    assert len(asked) == len(GRID) + 4


def test_what_keeps_at_once_is_left_alone_and_what_never_keeps_is_nothing():
    assert largest(lambda x: True) == 1.0
    assert largest(lambda x: x == 0) is None
    assert largest(lambda x: False) is None  # not even the start, by noise


def test_where_what_keeps_is_no_interval_the_answer_keeps_all_the_same():
    kept = {0.0, 0.1, 0.6, 0.65}
    assert largest(lambda x: any(abs(x - k) < 1e-9 for k in kept)) == pytest.approx(0.65)
