"""The global norm is right for large tensors, where adding squares in fp32 is not."""

import math

import pytest
import torch
import workers
from torch import nn
from zero_worlds import adamw, settle

from framework.strategy.common import sum_of_squares
from framework.strategy.zero import Zero


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


class Large(nn.Module):
    """One matrix of 2^24 elements, each with the gradient `batch`."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(2**12, 2**12))

    def blocks(self):
        return []

    def forward(self, batch):
        return (self.matrix * batch.to(self.matrix.dtype)).sum()


def measures(world, stage, precision):
    settle()
    strategy = Zero(world, stage=stage, precision=precision)
    engine = strategy.train(Large, lambda: iter([("matrix", torch.zeros(2**12, 2**12))]), adamw)
    with engine.micro(last=True):
        engine.backward(engine(torch.tensor(0.1)))
    norm = engine.step(lr=1.0, max_grad_norm=100.0)
    (weights,) = (tensor for _, tensor in engine.weights())
    return norm, weights[0, 0].item()


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_zero_measures_and_clips_by_the_same_norm(stage, precision):
    """Two ranks add 0.1 each: sqrt(2^24) * 0.2 = 819.2 before clipping. Clipped to 100 the gradient is
    0.2 * 100 / 819.2 = 0.0244; AdamW's first step with eps = 1 moves by g / (g + 1)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tenth = torch.tensor(0.1, dtype=dtype).item()
    clipped = 100 / 2**12
    for norm, moved in workers.run(2, measures, stage, precision):
        assert norm == pytest.approx(2**12 * 2 * tenth, rel=1e-6)
        assert moved == pytest.approx(-clipped / (clipped + 1), rel=1e-4)
