"""The global norm is right for large tensors, where adding squares in fp32 is not."""

import math

import torch

from framework.strategy.common import sum_of_squares


def test_sum_of_squares_of_large_and_odd_tensors():
    """(2^24 + 3) * 0.1^2: plain fp32 norms miss by 1e-4 and more."""
    large = torch.full((2**24 + 3,), 0.1)
    small = torch.tensor([3.0, 4.0])
    expected = large.numel() * large[0].item() ** 2 + 25
    found = sum_of_squares([large, small, torch.empty(0, 7), small[:1].view(1, 1) * 0], torch.device("cpu"))
    assert found.dtype == torch.float64
    assert abs(found.item() / expected - 1) < 1e-6
    assert abs(torch._foreach_norm([large])[0].item() ** 2 / expected - 1) > 1e-5


def test_one_value_that_is_not_finite_shows():
    for poison in (math.inf, math.nan):
        gradient = torch.ones(40000)
        gradient[-1] = poison
        assert not math.isfinite(sum_of_squares([torch.ones(3), gradient], torch.device("cpu")).item())
    assert sum_of_squares([], torch.device("cpu")).item() == 0
