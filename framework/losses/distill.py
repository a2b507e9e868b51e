"""Distillation: a student's distribution over the vocabulary towards a teacher's, position by position.

The caller hands over rows of log-probabilities, as many at a time as memory allows; both models share one
vocabulary, and a logit that stands for no token is -inf in both. The temperature, if any, is in the
log-probabilities already and there is no factor T^2. On-policy distillation is the same on answers that
the student drew. Letters: K positions, V vocabulary or some of it, T teacher, S student.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from framework.losses.guard import require
from framework.losses.items import Items


def forward_kl(student_logps: Tensor, teacher_logps: Tensor, weight: Tensor) -> Items:
    """KL(T, S) = sum_v T(v) (log T(v) - log S(v)): the student covers all that the teacher would say.

    Hinton et al. 2015, arXiv 1503.02531. student_logps, teacher_logps [K, V] nats, of which each row is a
    distribution; weight [K], 0 = not counted; the loss in nats.
    """
    student, teacher = _rows(student_logps, teacher_logps, weight)
    return _items(_kl(teacher, student), weight)


def reverse_kl(student_logps: Tensor, teacher_logps: Tensor, weight: Tensor) -> Items:
    """KL(S, T) = sum_v S(v) (log S(v) - log T(v)): the student says nothing that the teacher would not.

    Gu et al. 2023, arXiv 2306.08543, here exact over the vocabulary. Shapes as in `forward_kl`. A token
    that the teacher rules out and the student does not makes it infinite.
    """
    student, teacher = _rows(student_logps, teacher_logps, weight)
    return _items(_kl(student, teacher), weight)


def generalised_jsd(student_logps: Tensor, teacher_logps: Tensor, weight: Tensor, *, beta: float) -> Items:
    """b KL(T, M) + (1 - b) KL(S, M), M = b T + (1 - b) S.

    Agarwal et al. 2023, arXiv 2306.13649, equation 1. b = `beta` in [0, 1]; as in TRL b = 0 is taken as
    `forward_kl` and b = 1 as `reverse_kl`, to which the formula divided by b (1 - b) tends, while by itself
    it tends to 0 at both ends; 0.5 is the Jensen-Shannon divergence. Shapes as in `forward_kl`. Raises
    ValueError for b outside its range.
    """
    require("beta", beta, least=0, most=1)
    if beta == 0:
        return forward_kl(student_logps, teacher_logps, weight)
    if beta == 1:
        return reverse_kl(student_logps, teacher_logps, weight)
    student, teacher = _rows(student_logps, teacher_logps, weight)
    ruled_out = torch.isneginf(student) & torch.isneginf(teacher)
    low = torch.finfo(student.dtype).min / 4
    mixture = torch.logaddexp(
        student.masked_fill(ruled_out, low) + math.log1p(-beta),
        teacher.masked_fill(ruled_out, low) + math.log(beta),
    )
    return _items(beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture), weight)


def truncated(logps: Tensor, *, rest: Literal["renormalise", "bucket"]) -> Tensor:
    """A distribution from the log-probabilities [K, k] of some tokens of each row only.

    For a teacher of whom the k likeliest tokens are known: the same is done to the student's at the same
    tokens, and the two go to a divergence. "renormalise": [K, k], divided by their sum, so that nothing is
    said about the rest and the student may put any mass there. "bucket": [K, k + 1], with all other tokens
    as one of probability 1 - sum, so that the mass of the rest is learnt, though not its shape. Raises
    ValueError for another word.
    """
    logps = logps if logps.dtype == torch.float64 else logps.float()
    total = logps.logsumexp(-1, keepdim=True)
    if rest == "renormalise":
        return logps - total
    if rest != "bucket":
        raise ValueError(f"rest={rest}; expected renormalise or bucket")
    total = total.clamp(max=-torch.finfo(logps.dtype).eps)  # rounding can reach a sum of 1
    return torch.cat([logps, torch.log(-torch.expm1(total))], -1)


def sampled_advantages(teacher_logps: Tensor, old_logps: Tensor) -> Tensor:
    """[K] log T(x) - log S(x) of tokens x that the student drew: on-policy distillation by policy gradient.

    With `policy_gradient.reinforce` on them the mean gradient is that of the reverse KL per token (Lu et al.
    2025, "On-policy distillation"). Both [K] nats; the result is held constant.
    """
    return (teacher_logps - old_logps).detach()


def _rows(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp32 or wider; a row that does not count is even over the vocabulary in both."""
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    even = torch.full((), -math.log(student.shape[-1]), dtype=wide, device=student.device)
    counts = (weight > 0)[:, None]
    return torch.where(counts, student.to(wide), even), torch.where(counts, teacher.to(wide), even)


def _kl(left: Tensor, right: Tensor) -> Tensor:
    """[K] sum_v exp(left) (left - right); a token of probability 0 on the left adds nothing."""
    possible = ~torch.isneginf(left)
    zero = torch.zeros_like(left)
    difference = torch.where(possible, left, zero) - torch.where(possible, right, zero)
    return (left.exp() * difference).sum(-1)


def _items(loss: Tensor, weight: Tensor) -> Items:
    return Items(loss, weight, {"divergence": loss.detach()})
