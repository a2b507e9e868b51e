"""Preference losses: numbers worked by hand, what each reduces to, and answers from tokens."""

import math

import pytest
import torch

from framework.losses.answers import Answers, answer_sums, segment_sums, wpo_weights
from framework.losses.aot import aot, aot_unpaired
from framework.losses.bco import bco_baseline
from framework.losses.dpo import divergence_scores, dpo, dpo_norm, hinge, odpo, robust
from framework.losses.exo import exo
from framework.losses.ipo import ipo
from framework.losses.kto import apo_zero_unpaired, kto
from framework.losses.mixed import PARTS, mixed
from framework.losses.orpo import orpo
from framework.losses.reward import bradley_terry
from framework.losses.sft import chosen_sft
from framework.losses.simpo import alphapo, cpo, simpo


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def close(found, expected, rtol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=rtol, atol=1e-12)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


POLICY = Answers(tensor(-2.0, -6.0), tensor(-3.0, -4.0), tensor(4.0, 3.0), tensor(2.0, 8.0))
REFERENCE = Answers(tensor(-2.5, -5.0), tensor(-2.0, -4.4), tensor(4.0, 3.0), tensor(2.0, 8.0))
ONE_TOKEN = POLICY._replace(chosen_tokens=tensor(1.0, 1.0), rejected_tokens=tensor(1.0, 1.0))
WEIGHT = tensor(1.0, 1.0)


def test_simpo_by_hand():
    """Means: -0.5 and -1.5, then -2 and -0.5. With beta 2 and gamma 1 the logits are 2 * 1 - 1 = 1 and
    2 * (-1.5) - 1 = -4, so the losses are log(1 + e^-1) and log(1 + e^4)."""
    items = simpo(POLICY, WEIGHT, beta=2.0, gamma=1.0)
    close(items.loss, [softplus(-1.0), softplus(4.0)])
    close(items.metrics["rewards/margin"], [2.0, -3.0])
    close(items.metrics["rewards/accuracy"], [1.0, 0.0])


def test_alphapo_by_hand_and_at_its_limit():
    """a = 0.5, first pair: R(-0.5) = (1 - e^0.25) / 0.5, R(-1.5) = (1 - e^0.75) / 0.5."""
    first = (1 - math.exp(0.25)) / 0.5 - (1 - math.exp(0.75)) / 0.5
    items = alphapo(POLICY, WEIGHT, beta=2.0, gamma=1.0, alpha=0.5)
    close(items.loss[0], softplus(-(2 * first - 1.0)))
    near = alphapo(POLICY, WEIGHT, beta=2.0, gamma=1.0, alpha=1e-9)
    exact = alphapo(POLICY, WEIGHT, beta=2.0, gamma=1.0, alpha=0.0)
    close(exact.loss, simpo(POLICY, WEIGHT, beta=2.0, gamma=1.0).loss)
    close(near.loss, exact.loss, rtol=1e-7)


def test_cpo_by_hand():
    """w - l = 1 and -2; the chosen answers' NLL per mean length 3.5 is 2 / 3.5 and 6 / 3.5."""
    items = cpo(POLICY, WEIGHT, 3.5, beta=0.1, nll=0.5)
    close(items.loss, [softplus(-0.1) + 0.5 * 2 / 3.5, softplus(0.2) + 0.5 * 6 / 3.5])
    token_mean = chosen_sft(POLICY, WEIGHT, 3.5)
    close(token_mean.total() / 2, (2 + 6) / 7)


def test_orpo_by_hand():
    """Mean log-probabilities log 0.5 and log 0.2 have odds 1 and 0.25: log odds ratio log 4, s(log 4) = 0.8.
    With beta 0.1 and 2 trained tokens per pair the loss is 2 log 2 / 2 - 0.1 log 0.8."""
    policy = Answers(tensor(2 * math.log(0.5)), tensor(math.log(0.2)), tensor(2.0), tensor(1.0))
    items = orpo(policy, tensor(1.0), 2.0, beta=0.1)
    close(items.loss, [math.log(2) - 0.1 * math.log(0.8)])
    close(items.metrics["log_odds"], [math.log(4)])


def test_orpo_of_a_certain_answer_is_finite():
    """fp32, log-probability 0: the odds stop where 1 - p is the precision of the type."""
    zero = torch.zeros(1)
    chosen = zero.clone().requires_grad_()
    items = orpo(Answers(chosen, zero - 1, zero + 3, zero + 3), zero + 1, 3.0, beta=0.1)
    items.total().backward()
    assert items.loss.isfinite().all()
    assert chosen.grad.isfinite().all()


def test_an_offset_moves_the_logit():
    """D = 0.5 + 1 = 1.5, then -1 - 0.4 = -1.4; margins 1 and 0.5 times 0.2."""
    items = odpo(POLICY, REFERENCE, WEIGHT, tensor(1.0, 0.5), beta=0.1, margin_scale=0.2)
    close(items.loss, [softplus(-(0.15 - 0.2)), softplus(-(-0.14 - 0.1))])
    without = odpo(POLICY, REFERENCE, WEIGHT, tensor(1.0, 0.5), beta=0.1, margin_scale=0.0)
    close(without.loss, dpo(POLICY, REFERENCE, WEIGHT, beta=0.1).loss)


def test_what_each_reduces_to():
    plain = dpo(POLICY, REFERENCE, WEIGHT, beta=0.1).loss
    close(robust(POLICY, REFERENCE, WEIGHT, beta=0.1, label_smoothing=0.0).loss, plain)
    close(dpo(POLICY, REFERENCE, WEIGHT, beta=0.1, divergence="alpha", alpha=1.0).loss, plain)
    close(dpo_norm(ONE_TOKEN, REFERENCE, WEIGHT, beta=0.1).loss, plain)
    own = REFERENCE.chosen - REFERENCE.rejected
    close(aot(POLICY, REFERENCE, WEIGHT, own, beta=0.1).loss, plain)
    token, total = (
        ipo(ONE_TOKEN, REFERENCE, WEIGHT, beta=0.1, normalisation=n).loss for n in ("token", "sum")
    )
    close(token, total)
    close(hinge(POLICY, REFERENCE, WEIGHT, beta=0.1).loss, [1 - 0.15, 1 + 0.14])
    close(mixed(POLICY, WEIGHT, REFERENCE, losses={"dpo": 1.0}, keywords={"dpo": {"beta": 0.1}}).loss, plain)


def test_exo_is_zero_where_policy_and_labels_agree():
    """q = 1 - e needs b D = log((1 - e) / e): with D = 2 and e = 0.1 that is b = log(9) / 2."""
    policy = Answers(tensor(1.0), tensor(-1.0), tensor(1.0), tensor(1.0))
    nothing = Answers(tensor(0.0), tensor(0.0), tensor(1.0), tensor(1.0))
    items = exo(policy, nothing, tensor(1.0), beta=math.log(9) / 2, label_smoothing=0.1)
    close(items.loss, [0.0])


def test_robust_is_unbiased():
    """The mean of the robust loss over labels flipped with probability e is DPO's on the true labels."""
    flipped = Answers(POLICY.rejected, POLICY.chosen, POLICY.rejected_tokens, POLICY.chosen_tokens)
    flipped_reference = Answers(REFERENCE.rejected, REFERENCE.chosen, *REFERENCE[2:])
    settings = {"beta": 0.7, "label_smoothing": 0.2}
    right = robust(POLICY, REFERENCE, WEIGHT, **settings).loss
    wrong = robust(flipped, flipped_reference, WEIGHT, **settings).loss
    close(0.8 * right + 0.2 * wrong, dpo(POLICY, REFERENCE, WEIGHT, beta=0.7).loss)


@pytest.mark.parametrize(
    ("divergence", "alpha", "expected"),
    [
        ("reverse_kl", 0.5, math.log(2)),
        ("forward_kl", 0.5, 1 - 1 / 2),
        ("js", 0.5, math.log(4 / 3)),
        ("alpha", 0.5, (2**-0.5 - 1) / -0.5),
        ("alpha", 0.0, 1 - 1 / 2),
        ("alpha", 1.0, math.log(2)),
    ],
)
def test_derivatives_of_the_divergences_at_two(divergence, alpha, expected):
    """f'(2): log 2, 1 - 1/2, log(4/3), (2^-0.5 - 1) / -0.5; alpha has forward KL at 0, reverse KL at 1."""
    close(divergence_scores(tensor(math.log(2)), divergence, alpha), [expected])


def test_aot_unpaired_has_the_slopes_of_sorted_losses():
    """Against the same loss written with sorts, which autograd takes apart: value and both gradients."""
    torch.manual_seed(0)
    chosen, rejected = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    zero, ones = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)

    def of_rank(ours, theirs):
        matched = torch.empty_like(theirs)
        matched[ours.argsort()] = theirs.sort().values
        return matched.detach()

    policy, reference = Answers(chosen, rejected, ones, ones), Answers(zero, zero, ones, ones)
    below, above = of_rank(chosen, rejected), of_rank(rejected, chosen)
    ours = aot_unpaired(policy, reference, ones, below, above, beta=0.5).total()
    sorted_difference = chosen.sort().values - rejected.sort().values
    theirs = -torch.nn.functional.logsigmoid(0.5 * sorted_difference).sum()
    close(ours, theirs.item())
    for one, other in zip(
        torch.autograd.grad(ours, (chosen, rejected)),
        torch.autograd.grad(theirs, (chosen, rejected)),
        strict=True,
    ):
        close(one, other)


def test_unpaired_losses():
    """KTO with baseline 0 is APO-zero unpaired; BCO's mean goes from 1.0 over 4 answers by a sum of 6 over 4
    more to (4 + 6) / 8 = 1.25."""
    policy, reference = tensor(-1.0, -4.0), tensor(-2.0, -3.0)
    liked = torch.tensor([True, False])
    settings = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    anchored = apo_zero_unpaired(policy, reference, liked, WEIGHT, **settings)
    close(kto(policy, reference, liked, WEIGHT, torch.zeros(()), **settings).loss, anchored.loss)
    assert anchored.metrics["rewards/desirable"].isnan().tolist() == [False, True]
    assert bco_baseline(1.0, 4.0, 6.0, 4.0) == (1.25, 8.0)
    assert bco_baseline(0.0, 0.0, 0.0, 0.0) == (0.0, 0.0)


def test_half_precision_scores_are_compared_in_fp32():
    """In bf16 the difference of 100.5 and 100 would be rounded, and the loss with it."""
    chosen, rejected = torch.tensor([100.5]).bfloat16(), torch.tensor([100.0]).bfloat16()
    items = bradley_terry(chosen, rejected, torch.ones(1))
    assert items.loss.dtype == torch.float32
    assert items.loss.item() == pytest.approx(softplus(-0.5), rel=1e-6)


# --- answers from tokens

SEGMENTS = torch.tensor([0, 0, 0, 1, 2, 3, 3])  # lengths 3 and 1, then 1 and 2
LOGPS = tensor(-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0)


def test_sums_and_counts():
    found = answer_sums(LOGPS, SEGMENTS, 4)
    assert [field.tolist() for field in found] == [[-6, -5], [-4, -13], [3, 1], [1, 2]]


def test_a_longer_tail_counts_for_less():
    """Shared length 1 in both pairs: -1 + 0.5 (-2 - 3) = -3.5, and -6 + 0.5 (-7) = -9.5."""
    found = answer_sums(LOGPS, SEGMENTS, 4, ld_alpha=0.5)
    assert found.chosen.tolist() == [-3.5, -5.0]
    assert found.rejected.tolist() == [-4.0, -9.5]
    assert found.chosen_tokens.tolist() == [3, 1]


def test_segments_may_interleave():
    order = torch.tensor([3, 0, 5, 1, 4, 2, 6])  # tokens of one segment keep their order
    for ld_alpha in (1.0, 0.5):
        expected = answer_sums(LOGPS, SEGMENTS, 4, ld_alpha=ld_alpha)
        found = answer_sums(LOGPS[order], SEGMENTS[order], 4, ld_alpha=ld_alpha)
        for one, other in zip(found, expected, strict=True):
            assert one.tolist() == other.tolist()


def test_long_sums_keep_their_digits():
    """2000 times -0.1 in fp32 is off by 1e-3 when added up in fp32; here it is right to the last digit."""
    sums = segment_sums(torch.full((2000,), -0.1), torch.zeros(2000, dtype=torch.int64), 1)
    assert sums.item() == torch.tensor(2000 * float(torch.tensor(-0.1)), dtype=torch.float64).float().item()


def test_wpo_weights_by_hand():
    """Log-probabilities less collisions: pair 0 has means -2 + 1 and -4 + 1, pair 1 has -5 + 1, -6.5 + 1."""
    logps = LOGPS.clone().requires_grad_()
    weights = wpo_weights(logps, torch.full_like(LOGPS, -1.0), SEGMENTS, 4)
    close(weights, [math.exp(-4.0), math.exp(-9.5)])
    assert not weights.requires_grad


# --- mixtures


def test_a_mixture_is_the_weighted_sum_of_its_parts():
    settings = {"beta": 0.1}
    items = mixed(
        POLICY,
        WEIGHT,
        REFERENCE,
        tokens_per_pair=3.5,
        losses={"dpo": 0.8, "sft": 1.0},
        keywords={"dpo": settings},
    )
    parts = {"dpo": dpo(POLICY, REFERENCE, WEIGHT, **settings), "sft": chosen_sft(POLICY, WEIGHT, 3.5)}
    close(items.loss, 0.8 * parts["dpo"].loss + parts["sft"].loss)
    for name, part in parts.items():
        close(items.metrics[f"loss/{name}"], part.loss)
    close(items.metrics["rewards/margin"], parts["dpo"].metrics["rewards/margin"])


@pytest.mark.parametrize(
    ("losses", "keywords", "message"),
    [
        ({}, {}, "losses is empty"),
        ({"dpoo": 1.0}, {}, "losses.dpoo is no loss"),
        ({"dpo": 0.0}, {"dpo": {"beta": 0.1}}, "losses.dpo=0.0 is outside"),
        ({"dpo": float("nan")}, {"dpo": {"beta": 0.1}}, "losses.dpo=nan is outside"),
        ({"dpo": 1.0}, {}, "keywords.dpo.beta is not set"),
        ({"dpo": 1.0}, {"dpo": {"beta": 0.1, "gamma": 1}}, "keywords.dpo.gamma is unknown"),
        ({"sft": 1.0}, {"dpo": {"beta": 0.1}}, "keywords.dpo has no loss"),
        ({"dpo": 1.0}, {"dpo": {"beta": -1}}, "beta=-1 is outside"),
        ({"sft": 1.0}, {}, "losses.sft needs tokens_per_pair"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(losses, keywords, message):
    with pytest.raises(ValueError, match=message):
        mixed(POLICY, WEIGHT, REFERENCE, losses=losses, keywords=keywords)


def test_every_part_of_a_mixture_is_a_loss_of_pairs():
    import inspect

    offered = {"policy", "weight", "reference", "margin", "tokens_per_pair"}
    for name, part in PARTS.items():
        positional = {
            p.name for p in inspect.signature(part).parameters.values() if p.kind is not p.KEYWORD_ONLY
        }
        assert positional <= offered, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dpo(POLICY, REFERENCE, WEIGHT, beta=0.1, divergence="tv"), "divergence=tv"),
        (lambda: ipo(POLICY, REFERENCE, WEIGHT, beta=0.1, normalisation="both"), "normalisation=both"),
        (lambda: dpo(POLICY, REFERENCE, WEIGHT, beta=0.1, label_smoothing=0.5), r"\[0, 0.5\)"),
        (lambda: answer_sums(LOGPS, SEGMENTS, 4, ld_alpha=1.5), r"ld_alpha=1.5 is outside \[0, 1\]"),
        (lambda: exo(POLICY, REFERENCE, WEIGHT, beta=0.1, label_smoothing=0.0), r"\(0, 0.5\)"),
    ],
)
def test_refusals_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
