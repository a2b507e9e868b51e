"""Reward modelling with scores fixed by hand."""

import contextlib
import math
from functools import partial

import judged
import pytest
import torch

from framework.batch import Scores
from framework.losses.items import Items
from framework.losses.reward import bradley_terry
from framework.stages.reward import Reward, RewardObjective, longer, score_moments

# The longer answer is the chosen one, then the rejected one, then neither.
ROWS = [([1, 2], [3, 4, 5], [6]), ([1], [7], [9, 3]), ([1], [8], [9])]
make = partial(judged.pairs, scored=True)


class Scoring:
    """An engine that scores a segment by the id of its last token: 5 against 6, 7 against 3, 8 against 9."""

    world = judged.One()

    @contextlib.contextmanager
    def inference(self):
        yield

    def __call__(self, batch, **options):
        return Scores(batch.input_ids.flatten()[batch.trained].float())


def test_a_loss_gets_scores_of_pairs_by_name():
    got = {}

    def loss(chosen, rejected, margin, weight):
        got.update(chosen=chosen, rejected=rejected, margin=margin)
        return Items(rejected - chosen + margin, weight)

    batch = make(ROWS, weights=[1.0, 0.5, 1.0], margins=[0.0, 1.0, 0.0])
    items = RewardObjective(loss)(Scoring(), batch)
    assert got["chosen"].tolist() == [5.0, 7.0, 8.0]
    assert got["rejected"].tolist() == [6.0, 3.0, 9.0]
    assert items.weight.tolist() == [1.0, 0.5, 1.0]
    assert float(items.total()) == 1 + 0.5 * (-4 + 1) + 1


def test_accuracy_counts_ties_half():
    batch = make([([1], [5], [4, 5]), ([1], [6], [5]), ([1], [5], [6])])
    metrics = RewardObjective(bradley_terry)(Scoring(), batch).metrics
    assert metrics["rewards/accuracy"].tolist() == [0.5, 1.0, 0.0]
    assert metrics["rewards/mean"].tolist() == [5.0, 5.5, 5.5]


def test_bradley_terry_by_hand():
    """-log s(5 - 6), -log s(7 - 3), -log s(8 - 9)."""
    items = RewardObjective(bradley_terry)(Scoring(), make(ROWS))
    expected = [math.log(1 + math.exp(1)), math.log(1 + math.exp(-4)), math.log(1 + math.exp(1))]
    assert items.loss.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_length_alone_ranks_half_of_the_rows_right(packed):
    """Right, wrong and a tie: (1 + 0 + 1/2) / 3. Fills do not count."""
    batches = [make(ROWS[:2], packed=packed), make(ROWS[2:], packed=packed), make([], packed=packed)]
    assert longer(judged.One(), batches) == 0.5


def test_the_trivial_baseline_is_reported_once():
    stage = Reward(
        judged.Steps([ROWS], make), RewardObjective(bradley_terry), {"held": [make(ROWS)]}, engine=Scoring()
    )
    assert stage.reports() == [("baselines", {"held/longer": 0.5})]
    assert stage.reports() == []
    resumed = Reward(
        judged.Steps([ROWS], make), RewardObjective(bradley_terry), {"held": [make(ROWS)]}, engine=Scoring()
    )
    resumed.load_state_dict({"index": 1})
    assert resumed.reports() == []


def test_moments_are_of_all_answers_that_count():
    """5, 6, 7, 3, 8, 9 have mean 38 / 6 and variance 264 / 6 - mean^2."""
    stage = Reward(
        judged.Steps([ROWS], make),
        RewardObjective(bradley_terry),
        {"held": [make(ROWS[:2]), make(ROWS[2:]), make([])]},
        engine=Scoring(),
    )
    mean, deviation = stage.moments()["held"]
    assert mean == pytest.approx(38 / 6)
    assert deviation == pytest.approx(math.sqrt(264 / 6 - (38 / 6) ** 2))


def test_a_large_mean_does_not_cost_the_deviation_its_digits():
    class Far(Scoring):
        def __call__(self, batch, **options):
            return Scores(super().__call__(batch).scores + torch.tensor(2.0**20))

    _, near = score_moments(Scoring(), [make(ROWS)])
    assert score_moments(Far(), [make(ROWS)])[1] == pytest.approx(near, rel=1e-9)
