"""Advantages: cases worked by hand, what each reduces to, missing rewards, and numbers that round badly."""

import math

import pytest
import torch

from framework.losses import advantages as adv


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-12, atol=1e-12)


TWO_GROUPS = torch.tensor([0, 0, 0, 1, 1])
REWARDS = tensor(1.0, 2.0, 6.0, 4.0, 4.0)


def test_groups_of_unequal_size_by_hand():
    """Group 0: mean 3, deviations -2, -1, 3, variance 14 / 2 = 7. Group 1 is all alike."""
    centred = [-2.0, -1.0, 3.0, 0.0, 0.0]
    close(adv.group_centred(REWARDS, TWO_GROUPS), centred)
    close(adv.group_normalised(REWARDS, TWO_GROUPS, eps=0.0), [x / math.sqrt(7) for x in centred])
    close(adv.leave_one_out(REWARDS, TWO_GROUPS), [x * 3 / 2 for x in centred])
    close(adv.best_of_group(REWARDS, TWO_GROUPS, eps=0.0), [0, 0, 4 / math.sqrt(7), 0, 0])
    over_all = (tensor(*[r - 3.4 for r in REWARDS.tolist()]).square().sum() / 4).sqrt()
    close(adv.batch_scaled(REWARDS, TWO_GROUPS, eps=0.0), tensor(*centred) / over_all)
    lengths = torch.tensor([1, 1, 2, 3, 4])  # baseline (1 + 2 + 12) / 4 = 3.75
    close(adv.length_weighted(REWARDS, TWO_GROUPS, lengths), [-2.75, -1.75, 2.25, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("reward", "count"), [(0.3, 7), (0.1, 3)])
@pytest.mark.parametrize("estimator", adv.ESTIMATORS.values(), ids=adv.ESTIMATORS)
def test_equal_rewards_teach_exactly_nothing(estimator, reward, count, dtype):
    """Seven times 0.3 in fp32 and three times 0.1 in fp64 have a mean that is not 0.3 and 0.1, and a
    deviation of the same size as the error."""
    rewards, groups = torch.full((count,), reward, dtype=dtype), torch.zeros(count, dtype=torch.int64)
    settings = {"eps": 0.0} if "eps" in (estimator.__kwdefaults__ or {}) else {}
    assert estimator(rewards, groups, **settings).tolist() == [0.0] * count


@pytest.mark.parametrize("estimator", adv.ESTIMATORS.values(), ids=adv.ESTIMATORS)
def test_a_missing_reward_enters_nothing(estimator):
    """NaN gets 0, and the others get what they would get without it; a group of nothing but NaN gets 0."""
    with_gaps = tensor(1.0, torch.nan, 2.0, 6.0, 4.0, 4.0, torch.nan, torch.nan)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    found = estimator(with_gaps, groups)
    there = ~with_gaps.isnan()
    close(found[there], estimator(REWARDS, TWO_GROUPS))
    assert found[~there].tolist() == [0.0] * 3


@pytest.mark.parametrize("estimator", adv.ESTIMATORS.values(), ids=adv.ESTIMATORS)
def test_a_group_of_one_gets_nothing(estimator):
    assert estimator(tensor(5.0), torch.tensor([0])).tolist() == [0.0]


def test_leave_one_out_is_what_it_says():
    torch.manual_seed(0)
    rewards = torch.randn(5, dtype=torch.float64)
    others = [(rewards.sum() - r) / 4 for r in rewards]
    close(adv.leave_one_out(rewards, torch.zeros(5, dtype=torch.int64)), rewards - torch.stack(others))


def test_two_equally_good_answers_are_not_paid():
    assert adv.best_of_group(tensor(1.0, 1.0, 0.0), torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]


def test_gdpo_by_hand():
    """Two columns, one group, eps 0: each becomes +-1/sqrt(2) times (1, -1). Weighted 3 and 1 their sum is
    (2, -2) / sqrt(2), which over the batch is again +-1 / sqrt(2)."""
    rewards = torch.stack([tensor(100.0, 0.0), tensor(0.0, 1.0)], 1)
    found = adv.gdpo(rewards, torch.zeros(2, dtype=torch.int64), tensor(3.0, 1.0), eps=0.0)
    close(found, [2**-0.5, -(2**-0.5)])
    gaps = torch.stack([tensor(1.0, 0.0, 0.5), tensor(0.0, 1.0, torch.nan)], 1)
    assert adv.gdpo(gaps, torch.zeros(3, dtype=torch.int64), tensor(1.0, 2.0))[2] == 0.0


def test_gae_over_interleaved_answers():
    """The order of the answers does not matter, that of an answer's tokens does."""
    torch.manual_seed(0)
    segments = torch.tensor([0, 0, 0, 1, 1, 2])
    rewards, values = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    settings = {"gamma": 0.9, "lambda_": 0.8}
    for found, expected in zip(
        adv.gae(rewards[order], values[order], segments[order], **settings),
        adv.gae(rewards, values, segments, **settings),
        strict=True,
    ):
        close(found, expected[order])


def test_tokens_left_out_are_passed_over():
    """The same as if they were not there."""
    mask = torch.tensor([True, False, True, True, False])
    segments, rewards, values = torch.tensor([0, 0, 0, 1, 1]), REWARDS, REWARDS / 3
    settings = {"gamma": 0.9, "lambda_": 0.8}
    whole = adv.gae(rewards, values, segments, mask, **settings)
    without = adv.gae(rewards[mask], values[mask], segments[mask], **settings)
    for found, expected in zip(whole, without, strict=True):
        close(found[mask], expected)
        assert found[~mask].tolist() == [0.0, 0.0]


def test_gae_at_its_ends():
    """l = 1: return minus value; l = 0: one step ahead; values of 0 and l = 1: returns to go."""
    rewards, values, segments = (
        tensor(1.0, 2.0, 4.0),
        tensor(0.5, 0.25, 2.0),
        torch.zeros(3, dtype=torch.int64),
    )
    to_go = [1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4.0]
    close(adv.returns_to_go(rewards, segments, gamma=0.5), to_go)
    advantages, returns = adv.gae(rewards, values, segments, gamma=0.5, lambda_=1.0)
    close(returns, to_go)
    close(advantages, tensor(*to_go) - values)
    ahead, _ = adv.gae(rewards, values, segments, gamma=0.5, lambda_=0.0)
    close(ahead, [1 + 0.125 - 0.5, 2 + 1.0 - 0.25, 4 - 2.0])


def test_nothing_to_estimate():
    nothing, segments = torch.empty(0), torch.empty(0, dtype=torch.int64)
    assert adv.gae(nothing, nothing, segments, gamma=1.0, lambda_=1.0)[0].shape == (0,)
    assert adv.group_normalised(nothing, segments).shape == (0,)
    assert adv.whiten(nothing, segments.bool()).shape == (0,)


def test_whitening():
    """Counted: 1, 2, 6 with mean 3 and variance 7; the rest is 0."""
    mask = torch.tensor([True, True, True, False, False])
    scale = math.sqrt(7)
    close(adv.whiten(REWARDS, mask, eps=0.0), [-2 / scale, -1 / scale, 3 / scale, 0, 0])
    kept = adv.whiten(REWARDS, mask, keep_mean=True, eps=0.0)
    close(kept, [3 - 2 / scale, 3 - 1 / scale, 3 + 3 / scale, 0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adv.gae(REWARDS, REWARDS, TWO_GROUPS, gamma=1.1, lambda_=1.0), "gamma=1.1"),
        (lambda: adv.gae(REWARDS, REWARDS, TWO_GROUPS, gamma=1.0, lambda_=-0.1), "lambda_=-0.1"),
        (lambda: adv.group_normalised(REWARDS, TWO_GROUPS, eps=-1.0), "eps=-1.0"),
    ],
)
def test_settings_outside_their_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
