"""Distillation: divergences worked by hand, ruled-out tokens, teachers known in part only."""

import math

import pytest
import torch

from framework.losses.distill import forward_kl, generalised_jsd, reverse_kl, sampled_advantages, truncated

ONE = torch.ones(1, dtype=torch.float64)


def logs(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


STUDENT, TEACHER = logs(0.5, 0.25, 0.25), logs(0.25, 0.25, 0.5)


def close(found, expected, rtol=1e-12):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-13)


def test_both_directions_by_hand():
    """KL(T, S) = 0.25 log(1/2) + 0.5 log 2 = 0.25 log 2, and the same the other way round by symmetry."""
    close(forward_kl(STUDENT, TEACHER, ONE).loss, [0.25 * math.log(2)])
    close(reverse_kl(STUDENT, TEACHER, ONE).loss, [0.25 * math.log(2)])
    lopsided = logs(0.8, 0.1, 0.1)
    assert forward_kl(lopsided, TEACHER, ONE).loss.item() != reverse_kl(lopsided, TEACHER, ONE).loss.item()


def test_jensen_shannon_by_hand():
    """b = 0.5: the mixture is (3/8, 1/4, 3/8); each part is 0.5 log(4/3) + 0.25 log(2/3)."""
    part = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    close(generalised_jsd(STUDENT, TEACHER, ONE, beta=0.5).loss, [part])


def test_the_ends_of_the_generalised_divergence():
    """At 0 and 1 it is taken as the two KLs, to which the formula over b (1 - b) tends."""
    student = logs(0.7, 0.2, 0.1)
    for beta, near, exact in ((0, 1e-6, forward_kl), (1, 1 - 1e-6, reverse_kl)):
        expected = exact(student, TEACHER, ONE).loss
        assert torch.equal(generalised_jsd(student, TEACHER, ONE, beta=beta).loss, expected)
        scaled = generalised_jsd(student, TEACHER, ONE, beta=near).loss / (near * (1 - near))
        torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=0)


def test_the_same_distribution_costs_nothing():
    for loss in (forward_kl, reverse_kl, lambda *a: generalised_jsd(*a, beta=0.3)):
        student = STUDENT.clone().requires_grad_()
        items = loss(student.log_softmax(-1), STUDENT, ONE)
        close(items.loss.detach(), [0.0])
        close(torch.autograd.grad(items.total(), student)[0], [[0.0, 0.0, 0.0]])


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, lambda *a: generalised_jsd(*a, beta=0.3)])
def test_a_row_of_padding_in_the_vocabulary_changes_nothing(loss):
    """A fourth logit of -inf in both: same value, same gradient, nothing missing."""
    logits = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    pad = torch.full((1, 1), -torch.inf, dtype=torch.float64)
    plain = loss(logits.log_softmax(-1), TEACHER, ONE)
    padded = loss(torch.cat([logits, pad], 1).log_softmax(-1), torch.cat([TEACHER, pad], 1), ONE)
    close(padded.loss.detach(), plain.loss.tolist())
    slopes = [torch.autograd.grad(items.total(), logits)[0] for items in (plain, padded)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-12, atol=1e-12)


def test_only_a_teacher_that_rules_out_makes_it_infinite():
    """The teacher never says the third token: forward KL is finite, reverse KL is not."""
    teacher = logs(0.5, 0.5, 0.0)
    close(forward_kl(STUDENT, teacher, ONE).loss, [0.5 * math.log(2)])
    assert reverse_kl(STUDENT, teacher, ONE).loss.isinf().all()
    assert generalised_jsd(STUDENT, teacher, ONE, beta=0.5).loss.isfinite().all()


def test_half_precision_is_widened():
    items = forward_kl(STUDENT.bfloat16(), TEACHER.bfloat16(), ONE.float())
    assert items.loss.dtype == torch.float32


def test_what_is_done_about_the_rest():
    """Of (0.5, 0.25, 0.125, 0.125) the first two are known: renormalised (2/3, 1/3); with a bucket
    (0.5, 0.25, 0.25)."""
    known = logs(0.5, 0.25)
    close(truncated(known, rest="renormalise").exp(), [[2 / 3, 1 / 3]])
    close(truncated(known, rest="bucket").exp(), [[0.5, 0.25, 0.25]])
    whole = torch.tensor([[0.0, -50.0]]).requires_grad_()  # a sum of 1 in fp32
    bucket = truncated(whole, rest="bucket")
    bucket.sum().backward()
    assert bucket.isfinite().all()
    assert whole.grad.isfinite().all()
    with pytest.raises(ValueError, match="rest=drop"):
        truncated(known, rest="drop")


def test_sampled_advantages_have_the_gradient_of_the_reverse_kl():
    """The expectation over the vocabulary written out: -sum_v S(v) A(v) d log S(v) = d KL(S, T)."""
    logits = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    student = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(reverse_kl(student, TEACHER, ONE).total(), logits, retain_graph=True)
    advantages = sampled_advantages(TEACHER, student)
    assert not advantages.requires_grad
    surrogate = -(student.exp().detach() * advantages * student).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], expected, rtol=1e-12, atol=1e-12)
