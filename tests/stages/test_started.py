"""Losses that ask the start model: tokens masked and samples weighed by hand, rehearsed rows as they are."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from framework.batch import Outputs
from framework.data import collate
from framework.losses.reweight import flow, stm
from framework.losses.sft import sft
from framework.stages.started import StartedObjective, means, scale_of

WORLD = SimpleNamespace(device=torch.device("cpu"), gather=lambda value: [value])
START = torch.tensor([-0.5, -1.5, -2.0, -4.0, -9.0, -9.0])  # nats of the trained tokens of three rows
NOW = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])


def batch(sources=(0, 0, 1)):
    """Three rows with two trained tokens each."""
    rows = [(np.arange(3), np.array([False, True, True])) for _ in range(3)]
    return collate.collate(rows, list(sources), packing=True, pad_id=0)


class Engine:
    world = WORLD

    def __call__(self, batch, *, needs):
        return Outputs(NOW)


def start(batches):
    return [START for _ in batches]


def test_tokens_that_the_start_model_finds_unlikely_are_not_learnt():
    """At most 2 nats: the first three tokens of the own rows; the third row is rehearsed and counts whole."""
    items = StartedObjective(partial(stm, most_nats=2.0), start, (1.0, 1.0), own=1)
    found = items(Engine(), batch())
    assert found.loss.tolist() == [1.0, 2.0, 3.0, 0.0, 5.0, 6.0]
    assert found.weight.tolist() == [1.0] * 6  # all stay in the denominator
    assert found.metrics["unmasked"].tolist() == [1, 1, 1, 0, 1, 1]


def test_without_a_limit_nothing_is_masked():
    given = {"logps": NOW, "weight": torch.ones(6)}
    assert torch.equal(stm(**given, start_logps=START, most_nats=math.inf).loss, sft(**given).loss)
    with pytest.raises(ValueError, match="most_nats"):
        stm(**given, start_logps=START, most_nats=0.0)


def test_samples_weigh_by_the_start_models_loss_over_its_median():
    """Mean losses 1, 3 and 9: the median is 3, so weights are e^-1/3, e^-1 and e^-3 over their mean."""
    whole = batch((0, 0, 0))
    assert means(START, whole).tolist() == [1.0, 3.0, 9.0]
    median, mean = scale_of(start, [whole], WORLD)
    expected = [math.exp(-value / 3) for value in (1, 3, 9)]
    assert median == 3.0
    assert mean == pytest.approx(sum(expected) / 3)
    found = StartedObjective(flow, start, (median, mean), own=1)(Engine(), whole)
    weights = (found.loss / -NOW).tolist()
    assert weights == pytest.approx([w / mean for w in expected for _ in range(2)], rel=1e-6)
    assert sum(weights[::2]) == pytest.approx(3.0, rel=1e-6)


def test_rehearsed_rows_weigh_one():
    found = StartedObjective(flow, start, (3.0, 0.5), own=1)(Engine(), batch())
    assert (found.loss / -NOW)[4:].tolist() == [1.0, 1.0]
    assert (found.loss / -NOW)[0].item() == pytest.approx(math.exp(-1 / 3) / 0.5)
