"""Replay that follows the start model: its divergence by hand, and found again by what a row says."""

import math

import numpy as np
import pytest
import torch

from framework.batch import Distribution, Outputs
from framework.data import collate
from framework.errors import CheckpointError
from framework.losses.sft import sft
from framework.stages.remembered import TowardsStart, remember
from framework.strategy.world import connect

ASKED = Distribution(vocabulary=4, temperature=1.0, likeliest=2)
START = torch.tensor([[0.5, 0.25]]).log()  # of tokens 3 and 1; the two others share a quarter
NOW = torch.tensor([0.1, 0.25, 0.4, 0.25]).log()  # of all four


class Engine:
    """Says START of every token when asked for the likeliest, and NOW when asked for given ones."""

    def __init__(self):
        self.world = connect("cpu", timeout_s=10, environment={})
        self.asked = 0

    def inference(self):
        return torch.no_grad()

    def __call__(self, batch, *, distribution):
        many = len(batch.trained)
        logps = NOW.expand(many, -1).gather(1, batch.targets[:, None])[:, 0]
        if distribution.likeliest:
            self.asked += 1
            ids = torch.tensor([[3, 1]]).expand(many, -1)
            return Outputs(logps, candidate_ids=ids, candidate_logps=START.expand(many, -1))
        return Outputs(logps, candidate_logps=NOW.expand(many, -1).gather(1, distribution.ids))


def batch(*rows, sources):
    """Of each row the last two tokens are trained."""
    examples = [(np.array(row), np.array([False] * (len(row) - 2) + [True] * 2)) for row in rows]
    return collate.collate(examples, sources, packing=True, pad_id=0)


MINE, REPLAYED = [0, 1, 2, 3], [1, 3, 0, 2]


@pytest.fixture
def memory(tmp_path):
    rows = batch(REPLAYED, sources=[1])
    return remember(tmp_path, {"model": "a"}, [rows], Engine(), ASKED, sources=[1])


def test_replayed_tokens_cost_their_divergence_and_others_their_own_loss(memory):
    """KL of (1/2, 1/4 | 1/4) and (1/4, 1/4 | 1/2) = 1/2 log 2 + 0 - 1/4 log 2 = 1/4 log 2, at both tokens."""
    mixed = batch(MINE, REPLAYED, sources=[0, 1])
    items = TowardsStart(sft, memory, ["mine", "general"])(Engine(), mixed)
    own, replayed = mixed.segments == 0, mixed.segments == 1
    assert items.loss[replayed].tolist() == pytest.approx([math.log(2) / 4] * 2)
    assert items.loss[own].tolist() == pytest.approx((-NOW[mixed.targets[own]]).tolist())
    assert items.metrics["kl"][own].isnan().all()
    assert items.metrics["kl"][replayed].tolist() == pytest.approx([math.log(2) / 4] * 2)
    assert items.metrics["loss/general"][replayed].tolist() == pytest.approx([math.log(2) / 4] * 2)


def test_a_row_is_found_wherever_it_stands(memory):
    alone, beside = (
        batch(*rows, sources=sources)
        for rows, sources in (([REPLAYED], [1]), ([MINE, MINE, REPLAYED], [0, 0, 1]))
    )
    assert torch.equal(memory(alone).logps, memory(beside).logps[memory(beside).known])
    assert memory(beside).known.tolist() == (beside.segments == 2).tolist()


def test_the_start_model_is_asked_once(tmp_path):
    rows, engine = [(batch(REPLAYED, sources=[1]))], Engine()
    for _ in range(2):
        remember(tmp_path, {"model": "a"}, rows, engine, ASKED, sources=[1])
    assert engine.asked == 1
    remember(tmp_path, {"model": "b"}, rows, engine, ASKED, sources=[1])
    assert engine.asked == 2


def test_a_row_that_was_never_asked_about_is_refused(memory):
    with pytest.raises(CheckpointError, match="never asked"):
        memory(batch(MINE, sources=[1]))


def test_a_gradient_reaches_the_likeliest_tokens(memory):
    """The rest of the distribution is one token more, whose logarithm must have a slope as well."""
    leaf = NOW.clone().requires_grad_()
    engine = Engine()
    engine.__class__ = type("Learns", (Engine,), {"__call__": lambda self, b, *, distribution: Outputs(
        leaf.expand(len(b.trained), -1).gather(1, b.targets[:, None])[:, 0],
        candidate_logps=leaf.expand(len(b.trained), -1).gather(1, distribution.ids),
    )})  # fmt: skip
    TowardsStart(sft, memory)(engine, (batch(REPLAYED, sources=[1]))).total().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[3] < 0  # more of what the start model liked best
