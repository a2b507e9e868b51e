"""A divergence from a teacher's whole distribution, out of two heads, a chunk of positions at a time.

Beside `candidates`, for all tokens at once: neither model's [K, V] exists, nor its gradient. Both heads are
multiplied in the forward pass and again in the backward pass. Knows no model and no machine. Letters: K
positions, d and e hidden widths of student and teacher, V vocabulary, n of V tokens that take part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from framework.losses.head import Buffers, Gradients, Rules, chunks, consumed_logsumexp, statistics_of
from framework.losses.items import Items

Divergence = Callable[[Tensor, Tensor, Tensor], Items]
"""(student [c, n], teacher [c, n] nats, weight [c]) -> items of c rows, each by itself; differentiable."""


class Head(NamedTuple):
    """What a frozen model says at K positions, not multiplied yet."""

    hidden: Tensor  # [K, e]
    weight: Tensor  # [n, e], in the type of `hidden`
    bias: Tensor | None  # [n]
    scale: float
    softcap: float | None


class Compared(NamedTuple):
    """What comparing answers."""

    targets: Tensor  # [K] log-probability of the targets, in the student's own distribution
    divergences: Tensor  # [K]
    counted: Tensor  # [K] weights as the divergence leaves them
    metrics: Mapping[str, Tensor]  # each [K], NaN where a chunk has no such one


class _How(NamedTuple):
    teacher: Head
    divergence: Divergence
    counted: Tensor  # [K] weights, which the divergence may read
    vocabulary: int
    temperature: float


def compared(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Head,
    divergence: Divergence,
    counted: Tensor,
    *,
    vocabulary: int,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    chunk: int = 1024,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Compared:
    """divergence(log softmax(logits[:n] / temperature), the teacher's likewise, counted), and beside it
    log softmax(logits)[targets].

    hidden [K, d], weight [V, d], targets [K] int64, counted [K], bias [V]; n = `vocabulary`, of which the
    teacher's weight has a row each; `head.Rules` says how logits come of the rest. The first two answers
    are differentiable with respect to the student. Raises ValueError for a number out of range.
    """
    if temperature <= 0 or not 0 < vocabulary <= weight.shape[0] or teacher.weight.shape[0] != vocabulary:
        raise ValueError(
            f"temperature={temperature} must be positive, vocabulary={vocabulary} in [1, {weight.shape[0]}] "
            f"and the teacher's rows, of which there are {teacher.weight.shape[0]}"
        )
    how = _How(teacher, divergence, counted, vocabulary, temperature)
    return Compared(*_Heads.apply(hidden, weight, targets, bias, Rules(chunk, scale, softcap, 1.0), how))


class _Said:
    """The teacher's log-probabilities, chunk by chunk."""

    def __init__(self, how: _How, chunk: int) -> None:
        head = how.teacher
        self._head = head
        self._rules = Rules(chunk, head.scale, head.softcap, how.temperature)
        self._buffers = Buffers(head.hidden, head.weight, chunk)

    def __call__(self, piece: slice) -> Tensor:
        head = self._head
        logits = self._buffers.logits(head.hidden[piece], head.weight, head.bias, self._rules)
        return logits.log_softmax(1)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        rules: Rules,
        how: _How,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        rows, matrix = hidden.shape[0], weight.to(hidden.dtype)
        own = hidden.new_empty(rows, dtype=statistics_of(hidden))
        lse, part_lse, divergences, counted = (torch.empty_like(own) for _ in range(4))
        metrics: dict[str, Tensor] = {}
        buffers, said = Buffers(hidden, matrix, rules.chunk), _Said(how, rules.chunk)
        for piece in chunks(rows, rules.chunk):
            logits = buffers.logits(hidden[piece], matrix, bias, rules)
            own[piece] = logits.gather(1, targets[piece, None])[:, 0]
            student = logits[:, : how.vocabulary] / how.temperature
            part_lse[piece] = student.logsumexp(1)
            student.sub_(part_lse[piece, None])
            found = how.divergence(student, said(piece), how.counted[piece])
            divergences[piece], counted[piece] = found.loss, found.weight
            for name, values in found.metrics.items():
                metrics.setdefault(name, torch.full_like(own, torch.nan))[piece] = values
            lse[piece] = consumed_logsumexp(logits)
        ctx.rules, ctx.how = rules, how
        ctx.mark_non_differentiable(counted)
        ctx.set_materialize_grads(False)  # an answer that only a metric reads costs no backward work
        ctx.save_for_backward(hidden, weight, targets, bias, lse, part_lse)
        return own.sub_(lse), divergences, counted, metrics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, for_own: Tensor | None, for_divergences: Tensor | None, *_: None
    ) -> tuple[Any, ...]:
        """With p the softmax, q that of the n at temperature T and g the divergence's slopes with respect to
        log q: d own = onehot - p, and d divergence = (g - q sum(g)) / T."""
        hidden, weight, targets, bias, lse, part_lse = ctx.saved_tensors
        want_hidden, want_weight, _, want_bias, _, _ = ctx.needs_input_grad
        how: _How = ctx.how
        gradients = Gradients(hidden, weight, bias, ctx.rules, (want_hidden, want_weight, want_bias))
        said = _Said(how, ctx.rules.chunk)
        for piece in chunks(hidden.shape[0], ctx.rules.chunk):
            logits, softcap_slopes = gradients.logits(piece)
            taught = None
            if for_divergences is not None:
                student = (logits[:, : how.vocabulary] / how.temperature).sub_(part_lse[piece, None])
                with torch.enable_grad():
                    student.requires_grad_()
                    found = how.divergence(student, said(piece), how.counted[piece]).loss
                    (taught,) = torch.autograd.grad(found, student, for_divergences[piece])
                taught = taught - student.detach().exp_() * taught.sum(1, keepdim=True)
            if for_own is None:
                slopes = logits.zero_()
            else:
                slopes = logits.sub_(lse[piece, None]).exp_().mul_(-for_own[piece, None])
                slopes.scatter_add_(1, targets[piece, None], for_own[piece, None])
            if taught is not None:
                slopes[:, : how.vocabulary] += taught.div_(how.temperature)
            gradients.add(piece, slopes, softcap_slopes)
        return gradients.hidden, gradients.weight, None, gradients.bias, None, None
