"""The chunked head against a plain log_softmax, value by value and gradient by gradient."""

import math

import pytest
import torch
from largest import Largest

from framework.losses.logprobs import token_logps

K, D, V = 7, 5, 11


def _inputs(dtype=torch.float64, rows=K, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(rows, D, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype).requires_grad_()
    bias = torch.randn(V, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (rows,)), bias


def _plain(hidden, weight, targets, bias=None, scale=1.0, softcap=None, temperature=1.0):
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=1)
    logps = log_p.gather(1, targets[:, None])[:, 0]
    return logps, -(log_p.exp() * log_p).sum(1), log_p.mean(1)


OPTIONS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"temperature": 1.7}]
OPTIONS += [{"scale": 1.9, "softcap": 1.5, "temperature": 0.6}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients_are_those_of_log_softmax(options, chunk):
    hidden, weight, targets, bias = _inputs()
    mix = torch.randn(3, K, dtype=torch.float64)
    ours = token_logps(hidden, weight, targets, bias=bias, chunk=chunk, entropies=True, means=True, **options)
    plain = _plain(hidden, weight, targets, bias, **options)
    for a, b in zip(ours[:3], plain, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    leaves = (hidden, weight, bias)
    grads = torch.autograd.grad(sum((m * a).sum() for m, a in zip(mix, ours[:3], strict=True)), leaves)
    expected = torch.autograd.grad(sum((m * a).sum() for m, a in zip(mix, plain, strict=True)), leaves)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("wanted", [{}, {"entropies": True}, {"means": True}])
def test_gradcheck(wanted):
    hidden, weight, targets, bias = _inputs(rows=4)

    def head(h, w, b):
        answers = token_logps(h, w, targets, bias=b, chunk=3, scale=0.7, softcap=3.0, **wanted)
        return tuple(a for a in answers if a is not None)

    assert torch.autograd.gradcheck(head, (hidden, weight, bias))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("beside", [False, True])
def test_collisions_are_the_log_of_the_sum_of_squares_and_change_no_gradient(options, beside):
    hidden, weight, targets, bias = _inputs()
    wanted = {"bias": bias, "chunk": 3, "entropies": beside, "means": beside} | options
    alone = token_logps(hidden, weight, targets, **wanted)
    ours = token_logps(hidden, weight, targets, collisions=True, **wanted)
    everyone = [_plain(hidden, weight, torch.full_like(targets, v), bias, **options)[0] for v in range(V)]
    squares = torch.stack(everyone).exp().square().sum(0)
    torch.testing.assert_close(ours.collisions, squares.log(), rtol=1e-12, atol=1e-12)
    assert not ours.collisions.requires_grad
    for a, b in zip(ours[:3], alone[:3], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    grads = [torch.autograd.grad(x.logps.sum(), (hidden, weight, bias)) for x in (ours, alone)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_collisions_of_a_sure_and_of_an_undecided_head():
    """fp32, V = 2000: one token at probability 1 gives log 1 = 0, a uniform law log(1 / V)."""
    sure = torch.zeros(1, 2000)
    sure[0, 3] = 300.0
    logits = torch.cat([sure, torch.zeros(1, 2000)])
    found = token_logps(logits, torch.eye(2000), torch.tensor([3, 3]), collisions=True).collisions
    torch.testing.assert_close(found, torch.tensor([0.0, -math.log(2000)]), rtol=1e-6, atol=1e-6)


def test_answers_not_asked_for_are_none():
    hidden, weight, targets, _ = _inputs()
    assert token_logps(hidden, weight, targets)[1:] == (None, None, None)


def test_an_entropy_that_only_a_metric_reads_changes_no_gradient():
    hidden, weight, targets, _ = _inputs()
    alone = torch.autograd.grad(token_logps(hidden, weight, targets)[0].sum(), (hidden, weight))
    logps, entropy, *_ = token_logps(hidden, weight, targets, entropies=True)
    entropy.detach()
    beside = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_half_precision_keeps_statistics_and_weight_gradient_in_fp32():
    """bf16 factors, K = 4096 positions in 64 chunks that all push the same way.

    The head's answers must be those of fp32 arithmetic on the *product* of bf16 matrices (error of
    one bf16 rounding of a logit of size 4: 2^-7), and the weight's gradient must not stall as a bf16
    running sum does (there an addend below 2^-9 of the sum is lost).
    """
    torch.manual_seed(0)
    hidden = (torch.rand(4096, D) + 0.5).bfloat16().requires_grad_()
    weight = torch.randn(V, D).bfloat16().requires_grad_()
    targets = torch.zeros(4096, dtype=torch.int64)
    logps, *_ = token_logps(hidden, weight, targets, chunk=64)
    assert logps.dtype == torch.float32
    plain = _plain(hidden.float(), weight.float(), targets)[0]
    assert (logps - plain).abs().max() < 2**-5
    (grad,) = torch.autograd.grad(logps.sum(), weight)
    (expected,) = torch.autograd.grad(plain.sum(), weight)
    assert ((grad.float() - expected).norm() / expected.norm()) < 4e-3


def test_no_position_at_all_is_still_part_of_the_graph():
    hidden, weight, targets, bias = _inputs(torch.float32, rows=0)
    logps, *_ = token_logps(hidden, weight, targets, bias=bias)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, D)
    assert torch.equal(weight.grad, torch.zeros(V, D))
    assert torch.equal(bias.grad, torch.zeros(V))


def test_a_frozen_weight_of_another_type_is_used_and_gets_no_gradient():
    hidden, weight, targets, _ = _inputs(torch.float32)
    frozen = weight.detach().bfloat16()
    logps, *_ = token_logps(hidden, frozen, targets)
    plain = _plain(hidden, frozen.float(), targets)[0]
    torch.testing.assert_close(logps, plain, rtol=1e-6, atol=1e-6)
    logps.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert frozen.grad is None


def test_weight_freed_after_forward_and_gathered_again_before_backward():
    """What ZeRO-3 does to a parameter: `.data` is emptied after the forward pass and is a *new*
    tensor in the backward pass. Only a reference to the parameter itself survives that."""
    hidden, weight, targets, _ = _inputs()
    parameter = torch.nn.Parameter(weight.detach().clone())
    logps, *_ = token_logps(hidden, parameter, targets, chunk=2)
    kept = parameter.data
    parameter.data = torch.empty(0, dtype=kept.dtype)
    parameter.data = kept.clone()
    kept.fill_(torch.nan)
    logps.sum().backward()
    expected = torch.autograd.grad(_plain(hidden, weight, targets)[0].sum(), (hidden, weight))
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(parameter.grad, expected[1])


def test_weight_whose_storage_is_resized_between_forward_and_backward():
    """What FSDP2 does: the same storage is resized to 0 and filled again, unseen by autograd."""
    hidden, weight, targets, _ = _inputs()
    parameter = torch.nn.Parameter(weight.detach().clone())
    logps, *_ = token_logps(hidden, parameter, targets, chunk=2)
    storage = parameter.untyped_storage()
    size = storage.size()
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
        storage.resize_(0)
        storage.resize_(size)
        parameter.copy_(weight)
    logps.sum().backward()
    (expected,) = torch.autograd.grad(_plain(hidden, weight, targets)[0].sum(), (weight,))
    torch.testing.assert_close(parameter.grad, expected)


def test_never_more_than_a_chunk_of_the_vocabulary():
    """The largest tensor that either pass makes has chunk * V entries, not K * V."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 4).requires_grad_()
    weight = torch.randn(1000, 4).requires_grad_()
    with Largest() as largest:
        token_logps(hidden, weight, torch.randint(1000, (64,)), chunk=8)[0].sum().backward()
    assert largest.entries == 8 * 1000


def test_refuses_a_chunk_or_temperature_of_nothing():
    hidden, weight, targets, _ = _inputs()
    with pytest.raises(ValueError, match="chunk=0"):
        token_logps(hidden, weight, targets, chunk=0)
    with pytest.raises(ValueError, match="temperature=0"):
        token_logps(hidden, weight, targets, temperature=0)
