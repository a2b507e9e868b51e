"""A divergence from two heads in chunks, against whole logits."""

from functools import partial

import pytest
import torch
from test_candidates import OPTIONS, inputs, plain

from framework.losses.distill import forward_kl, generalised_jsd, reverse_kl
from framework.losses.whole import Head, compared

WIDTH = 3  # of the teacher
LOSSES = {"forward": forward_kl, "reverse": reverse_kl, "jsd": partial(generalised_jsd, beta=0.3)}


def said(rows, n):
    """A teacher's head over n tokens, which scales and caps its logits."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(rows, WIDTH).double(), torch.randn(n, WIDTH).double()
    return Head(hidden, weight, torch.randn(n).double(), 1.4, 3.0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_values_and_gradients_are_those_of_whole_logits(options, chunk, loss):
    """Also of either answer alone, with a row that does not count."""
    hidden, weight, targets, bias, _ = inputs()
    n, temperature = options.get("vocabulary", 11), options.get("temperature", 1.0)
    teacher, counted = said(7, n), torch.tensor([1.0, 1, 0, 1, 1, 2, 1])
    found = compared(
        hidden, weight, targets, teacher, LOSSES[loss], counted,
        **{"bias": bias, "chunk": chunk, "vocabulary": n} | options,
    )  # fmt: skip
    own, student = plain(hidden, weight, targets, bias, **options)
    theirs = plain(*teacher[:2], targets.clamp(max=n - 1), teacher.bias, 1.4, 3.0, temperature, n)[1]
    expected = LOSSES[loss](student, theirs, counted).loss
    torch.testing.assert_close(found.targets, own, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.divergences, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(found.counted, counted.double())
    assert torch.equal(found.metrics["divergence"], found.divergences)
    mix = torch.randn_like(own)
    for a, b in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        sums = [
            sum(factor * (mix * x).sum() for factor, x in ((a, each), (b, target)) if factor)
            for each, target in ((found.divergences, found.targets), (expected, own))
        ]
        grads, wanted = (torch.autograd.grad(s, (hidden, weight, bias), retain_graph=True) for s in sums)
        for one, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_nothing_is_as_large_as_the_logits():
    """Of 64 positions in chunks of 4 the largest tensor of either pass has the rows of a chunk."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 8).requires_grad_(), torch.randn(101, 8).requires_grad_()
    largest = [0]

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            answer = function(*args, **(kwargs or {}))
            if isinstance(answer, torch.Tensor):
                largest.append(answer.numel())
            return answer

    teacher = Head(torch.randn(64, 8), torch.randn(101, 8), None, 1.0, None)

    def loss(student, theirs, counted):
        largest.append(student.numel())
        return LOSSES["jsd"](student, theirs, counted)

    with Watch():
        found = compared(
            hidden, weight, torch.zeros(64, dtype=torch.int64), teacher, loss, torch.ones(64),
            vocabulary=101, chunk=4,
        )  # fmt: skip
        found.divergences.sum().backward()
    assert 4 * 101 in largest
    assert max(largest) == max(4 * 101, weight.numel())


def test_other_rows_than_the_teachers_are_refused():
    hidden, weight, targets, _, _ = inputs()
    with pytest.raises(ValueError, match="of which there are 9"):
        compared(hidden, weight, targets, said(7, 9), LOSSES["jsd"], torch.ones(7), vocabulary=11)
