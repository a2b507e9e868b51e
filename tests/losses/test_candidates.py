"""Several tokens a position out of the chunked head, against a plain log_softmax."""

import pytest
import torch
from largest import Largest

from framework.losses.candidates import candidate_logps, likeliest_logps
from framework.losses.logprobs import token_logps

K, D, V, WIDTH = 7, 5, 11, 4


def inputs(dtype=torch.float64, rows=K):
    torch.manual_seed(0)
    hidden = torch.randn(rows, D, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype).requires_grad_()
    bias = torch.randn(V, dtype=dtype).requires_grad_()
    ids = torch.rand(rows, 8).argsort(1)[:, :WIDTH]
    return hidden, weight, torch.randint(V, (rows,)), bias, ids


def plain(hidden, weight, targets, bias=None, scale=1.0, softcap=None, temperature=1.0, vocabulary=V):
    """(log-probabilities [K] of the targets over V, those [K, n] of the part)."""
    logits = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    own = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return own, (logits[:, :vocabulary] / temperature).log_softmax(1)


OPTIONS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"temperature": 1.7}, {"vocabulary": 9}]
OPTIONS += [{"scale": 1.9, "softcap": 1.5, "temperature": 0.6, "vocabulary": 8}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_values_and_gradients_are_those_of_log_softmax(options, chunk):
    """Also of either answer alone, whose gradient takes another way."""
    hidden, weight, targets, bias, ids = inputs()
    found = candidate_logps(hidden, weight, targets, ids, bias=bias, chunk=chunk, **options)
    own, part = plain(hidden, weight, targets, bias, **options)
    expected = part.gather(1, ids)
    assert found.ids is ids
    torch.testing.assert_close(found.targets, own, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.logps, expected, rtol=1e-12, atol=1e-12)
    mix, some = torch.randn_like(expected), torch.randn_like(own)
    for a, b in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        sums = [
            sum(factor * (m * x).sum() for factor, m, x in ((a, mix, logps), (b, some, target)) if factor)
            for logps, target in ((found.logps, found.targets), (expected, own))
        ]
        grads, wanted = (torch.autograd.grad(s, (hidden, weight, bias), retain_graph=True) for s in sums)
        for one, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "vocabulary": 9}])
def test_gradcheck(options):
    hidden, weight, targets, bias, ids = inputs(rows=4)

    def head(h, w, b):
        found = candidate_logps(h, w, targets, ids, bias=b, chunk=3, scale=0.7, softcap=3.0, **options)
        return found.targets, found.logps

    assert torch.autograd.gradcheck(head, (hidden, weight, bias))


def test_a_token_that_comes_twice_is_counted_twice():
    hidden, weight, targets, _, ids = inputs()
    ids[:, 1] = ids[:, 0]
    found = candidate_logps(hidden, weight, targets, ids, chunk=3).logps
    expected = plain(hidden, weight, targets)[1].gather(1, ids)
    for one, other in zip(
        *(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [3, 100])
def test_the_likeliest_come_first_and_are_what_a_student_would_answer_there(options, chunk):
    hidden, weight, targets, bias, _ = inputs()
    found = likeliest_logps(hidden, weight, targets, WIDTH, bias=bias, chunk=chunk, **options)
    own, part = plain(hidden, weight, targets, bias, **options)
    values, ids = part.topk(WIDTH, dim=1)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.logps, values.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.targets, own.detach(), rtol=1e-12, atol=1e-12)
    assert not found.logps.requires_grad
    again = candidate_logps(hidden, weight, targets, found.ids, bias=bias, chunk=chunk, **options)
    assert torch.equal(again.logps, found.logps)


def test_all_of_them_are_the_whole_distribution():
    hidden, weight, targets, bias, _ = inputs()
    found = likeliest_logps(hidden, weight, targets, 9, bias=bias, vocabulary=9)
    torch.testing.assert_close(found.logps.exp().sum(1), torch.ones(K, dtype=torch.float64))


def test_the_targets_are_those_of_the_other_head():
    hidden, weight, targets, bias, ids = inputs(torch.float32)
    one = candidate_logps(hidden, weight, targets, ids, bias=bias, temperature=2.0, vocabulary=8, softcap=3.0)
    other = token_logps(hidden, weight, targets, bias=bias, softcap=3.0)
    torch.testing.assert_close(one.targets, other.logps, rtol=1e-6, atol=1e-6)


def test_half_precision_keeps_statistics_and_weight_gradient_in_fp32():
    """As of `token_logps`: 4096 positions in 64 chunks that all push one row the same way."""
    torch.manual_seed(0)
    hidden = (torch.rand(4096, D) + 0.5).bfloat16().requires_grad_()
    weight = torch.randn(V, D).bfloat16().requires_grad_()
    targets, ids = torch.zeros(4096, dtype=torch.int64), torch.arange(3).expand(4096, 3)
    found = candidate_logps(hidden, weight, targets, ids, chunk=64)
    assert found.logps.dtype == found.targets.dtype == torch.float32
    expected = plain(hidden.float(), weight.float(), targets)[1].gather(1, ids)
    assert (found.logps - expected).abs().max() < 2**-5
    (grad,) = torch.autograd.grad(found.logps[:, 0].sum(), weight)
    (wanted,) = torch.autograd.grad(expected[:, 0].sum(), weight)
    assert ((grad.float() - wanted).norm() / wanted.norm()) < 4e-3


def test_no_position_at_all_is_still_part_of_the_graph():
    hidden, weight, targets, bias, ids = inputs(torch.float32, rows=0)
    found = candidate_logps(hidden, weight, targets, ids, bias=bias)
    assert found.logps.shape == (0, WIDTH)
    (found.logps.sum() + found.targets.sum()).backward()
    assert hidden.grad.shape == (0, D)
    assert torch.equal(weight.grad, torch.zeros(V, D))


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, targets, _, ids = inputs(torch.float32)
    frozen = weight.detach().bfloat16()
    candidate_logps(hidden, frozen, targets, ids).logps.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert frozen.grad is None


def test_weight_freed_after_forward_and_gathered_again_before_backward():
    """What ZeRO-3 does to a parameter, see tests/losses/test_logprobs.py."""
    hidden, weight, targets, _, ids = inputs()
    parameter = torch.nn.Parameter(weight.detach().clone())
    logps = candidate_logps(hidden, parameter, targets, ids, chunk=2, vocabulary=9).logps
    kept = parameter.data
    parameter.data = torch.empty(0, dtype=kept.dtype)
    parameter.data = kept.clone()
    kept.fill_(torch.nan)
    logps.sum().backward()
    (expected,) = torch.autograd.grad(
        plain(hidden, weight, targets, vocabulary=9)[1].gather(1, ids).sum(), (weight,)
    )
    torch.testing.assert_close(parameter.grad, expected)


def test_never_more_than_a_chunk_of_the_vocabulary():
    """The largest tensor that any pass makes has chunk * V entries, not K * V."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 4).requires_grad_()
    weight = torch.randn(1000, 4).requires_grad_()
    targets, options = torch.randint(1000, (64,)), {"chunk": 8, "temperature": 2.0}
    with Largest() as largest:
        ids = likeliest_logps(hidden, weight, targets, 5, **options).ids
        found = candidate_logps(hidden, weight, targets, ids, **options)
        (found.logps.sum() + found.targets.sum()).backward()
    assert largest.entries == 8 * 1000


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"chunk": 0}, "chunk=0"),
        ({"temperature": 0}, "temperature=0"),
        ({"vocabulary": V + 1}, "vocabulary=12"),
        ({"vocabulary": 0}, "vocabulary=0"),
        ({"count": V + 1}, "count=12"),
        ({"vocabulary": 5, "count": 6}, "count=6"),
        ({"count": 0}, "count=0"),
    ],
)
def test_refuses_what_is_out_of_range(wrong, told):
    hidden, weight, targets, *_ = inputs()
    with pytest.raises(ValueError, match=told):
        likeliest_logps(hidden, weight, targets, **({"count": 2} | wrong))
