"""Drawing a token: the law is the one asked for, the kept log-probability is that of the law."""

import math

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from framework.rollout.base import Sampling
from framework.rollout.sampling import choose, uniforms

ALMOST_ONE = 1 - 2**-53


def draw(logits, numbers, **law):
    rows = torch.tensor(logits).expand(len(numbers), -1)
    tokens, logps = choose(rows, torch.tensor(numbers, dtype=torch.float64), Sampling(8, **law))
    return tokens.tolist(), logps.tolist()


def test_a_token_is_where_the_distribution_function_passes_the_number():
    """p = 1/2, 1/4, 1/8, 1/8: the function is .5, .75, .875, 1."""
    logits = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]
    tokens, logps = draw(logits, [0.0, 0.49, 0.51, 0.74, 0.76, 0.9, ALMOST_ONE])
    assert tokens == [0, 0, 1, 1, 2, 3, 3]
    assert logps == pytest.approx([math.log(p) for p in (0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125)])


def test_temperature_and_nucleus_change_the_law_and_its_log_probabilities():
    """Temperature 1/2 squares: 1/2, 1/4, 1/4 become 4, 1, 1 of 6. The nucleus of .7 of 1/2, 1/4, 1/8, 1/8 is
    the first two: 2/3 and 1/3. The two likeliest of 1/2, 1/4, 1/4 are three, since two are alike."""
    tokens, logps = draw([math.log(p) for p in (0.5, 0.25, 0.25)], [0.6, 0.7], temperature=0.5)
    assert tokens == [0, 1]
    assert logps == pytest.approx([math.log(4 / 6), math.log(1 / 6)])
    tokens, logps = draw(
        [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)], [0.66, 0.67, ALMOST_ONE], top_p=0.7
    )
    assert tokens == [0, 1, 1]
    assert logps == pytest.approx([math.log(2 / 3), math.log(1 / 3), math.log(1 / 3)])
    tokens, logps = draw([math.log(p) for p in (0.5, 0.25, 0.25)], [0.9], top_k=2)
    assert tokens == [2]
    assert logps == pytest.approx([math.log(0.25)])


def test_temperature_zero_takes_the_likeliest_and_keeps_the_models_own_log_probability():
    tokens, logps = draw([0.0, math.log(3.0), 0.0], [0.99], temperature=0.0, top_p=0.1, top_k=1)
    assert tokens == [1]
    assert logps == pytest.approx([math.log(3 / 5)])


@pytest.mark.parametrize(
    "law",
    [
        {"temperature": 0.7},
        {"top_k": 20},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 300, "top_p": 0.95},
        {"top_p": 0.9999},
    ],
)
def test_the_law_is_that_of_transformers(law):
    """3001 tokens, evenly spaced numbers: every token that transformers allows comes as often as it should
    (to one count), no other does, and the log-probabilities agree."""
    logits = torch.randn(1, 3001, generator=torch.Generator().manual_seed(0)) * 3
    steps = [TemperatureLogitsWarper(law.get("temperature", 1.0))]
    steps += [TopKLogitsWarper(law["top_k"])] if "top_k" in law else []
    steps += [TopPLogitsWarper(law["top_p"])] if "top_p" in law else []
    expected = LogitsProcessorList(steps)(None, logits.double()).log_softmax(-1)[0]
    count = 4000
    numbers = ((torch.arange(count) + 0.5) / count).tolist()
    tokens, logps = draw(logits[0].tolist(), numbers, **law)
    assert logps == pytest.approx(expected[tokens].tolist(), abs=2e-6)
    times = torch.bincount(torch.tensor(tokens), minlength=3001)
    assert ((times - count * expected.exp()).abs() <= 1.01).all()


@pytest.mark.parametrize("law", [{}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_a_row_is_drawn_alike_in_any_company(law):
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(1))
    numbers = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = choose(logits, numbers, Sampling(8, **law))
    alone = [choose(logits[i : i + 1], numbers[i : i + 1], Sampling(8, **law)) for i in range(5)]
    assert together[0].tolist() == [int(tokens) for tokens, _ in alone]
    assert together[1].tolist() == [float(logps) for _, logps in alone]


def test_a_token_without_probability_is_never_drawn():
    """Half of the vocabulary is impossible, at both ends of it; numbers at both ends of [0, 1)."""
    logits = torch.full((600,), -torch.inf)
    logits[200:400] = torch.randn(200, generator=torch.Generator().manual_seed(3)) * 10
    tokens, logps = draw(logits.tolist(), [0.0, 1e-300, ALMOST_ONE])
    assert all(200 <= token < 400 for token in tokens)
    assert all(math.isfinite(nats) for nats in logps)


def test_numbers_are_keyed_by_seed_prompt_and_sample():
    first = uniforms(Sampling(4, seed=1), 7, 0)
    assert torch.equal(first, uniforms(Sampling(4, seed=1), 7, 0))
    others = [
        uniforms(Sampling(4, seed=2), 7, 0),
        uniforms(Sampling(4, seed=1), 8, 0),
        uniforms(Sampling(4, seed=1), 7, 1),
    ]
    assert all(not torch.equal(first, other) for other in others)
