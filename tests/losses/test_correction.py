"""Weights for the difference between sampler and trainer, by hand."""

import math

import pytest
import torch

from framework.losses.correction import sampler_correction

SEGMENTS = torch.tensor([0, 0, 1, 1])
TRAINER = torch.tensor([-1.0, -2.0, -1.0, -1.0], dtype=torch.float64)
LOG_RATIOS = torch.tensor([1.0, -0.4, 0.2, 0.4], dtype=torch.float64)  # sums 0.6 and 0.6, means 0.3 and 0.3


def weights(log_ratios=LOG_RATIOS, **settings):
    given = {"level": "token", "outside": "truncate", "low": 0.0, "high": 2.0} | settings
    return sampler_correction(TRAINER, TRAINER - log_ratios, SEGMENTS, **given)


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_tokens():
    close(weights(), [2.0, math.exp(-0.4), math.exp(0.2), math.exp(0.4)])
    close(weights(outside="mask"), [0.0, math.exp(-0.4), math.exp(0.2), math.exp(0.4)])
    close(weights(low=0.9), [2.0, 0.9, math.exp(0.2), math.exp(0.4)])


def test_sequences():
    """The product of two tokens' ratios is e^0.6, its square root e^0.3."""
    close(weights(level="sequence"), [math.exp(0.6)] * 4)
    close(weights(level="geometric"), [math.exp(0.3)] * 4)
    close(weights(level="sequence", outside="mask", high=1.5), [0.0] * 4)


def test_answers_masked_with_raw_token_weights():
    """OpenRLHF's seq-mask-tis: whole answers by their geometric mean, the others weighted by token."""
    log_ratios = torch.tensor([1.0, 1.0, 0.2, 0.4], dtype=torch.float64)
    inside = weights(log_ratios, level="geometric", outside="mask", high=2.0) > 0
    close(weights(log_ratios, high=5.0) * inside, [0.0, 0.0, math.exp(0.2), math.exp(0.4)])


def test_unknown_and_absurd_probabilities():
    """NaN counts as agreement, in a product too; a difference of 1000 nats stays finite."""
    unknown = torch.tensor([torch.nan, -0.4, 1000.0, 0.0], dtype=torch.float64)
    close(weights(unknown, high=1e9), [1.0, math.exp(-0.4), math.exp(20), 1.0])
    close(weights(unknown, level="sequence", high=1e9)[:2], [math.exp(-0.4)] * 2)


def test_no_gradient_and_no_tokens():
    trainer = TRAINER.clone().requires_grad_()
    settings = {"level": "token", "outside": "truncate", "low": 0.0, "high": 2.0}
    assert not sampler_correction(trainer, TRAINER, SEGMENTS, **settings).requires_grad
    nothing = torch.empty(0)
    for level in ("token", "sequence", "geometric"):
        found = sampler_correction(nothing, nothing, nothing.long(), **(settings | {"level": level}))
        assert found.shape == (0,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": "word"}, "level=word"),
        ({"outside": "drop"}, "outside=drop"),
        ({"low": 1.5}, "low=1.5"),
        ({"high": 0.5}, "high=0.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        weights(**settings)
