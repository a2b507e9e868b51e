"""The language-model head in chunks: log-probabilities of given tokens, never a [tokens, vocabulary] tensor.

Knows no model and no machine. Letters: K positions, d hidden width, V vocabulary.

The forward pass keeps `hidden`, `weight` and one number per position; the backward pass multiplies
again, a chunk at a time. So at most [chunk, V] exists at any moment, in either pass. The weight is
saved as the very tensor that was handed in: a sharded model may free its storage after the forward
pass and gather it again before the backward pass, and then the parameter itself is the one thing that
still points at live numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from framework.losses.head import Buffers, Gradients, Rules, chunks, consumed_logsumexp, statistics_of


@dataclass(frozen=True)
class _Wanted:
    """Which answers."""

    entropies: bool
    means: bool
    collisions: bool


class TokenLogps(NamedTuple):
    """What the head answers, [K] each, in nats; None where it was not asked for."""

    logps: Tensor
    entropies: Tensor | None
    means: Tensor | None  # mean log-probability over the vocabulary
    collisions: Tensor | None  # log of sum_v p_v^2, without gradient


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = 1024,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropies: bool = False,
    means: bool = False,
    collisions: bool = False,
) -> TokenLogps:
    """log softmax(logits)[targets], and on request the entropy, the mean over the vocabulary and the
    collision probability, the chance that two draws give the same token.

    hidden [K, d], weight [V, d], targets [K] int64, bias [V]; `head.Rules` says how logits come of them.

    The product runs in `hidden`'s type; all that follows in fp32 (fp64 for fp64 inputs), and so does the
    sum of the weight's gradient over chunks. All answers but `collisions` are differentiable. K = 0 gives
    empty answers that are still part of the graph. A weight that asks for no gradient costs none. Raises
    ValueError for a chunk or a temperature that is not positive.
    """
    rules, wanted = Rules(chunk, scale, softcap, temperature), _Wanted(entropies, means, collisions)
    logps, entropy, mean, collision = _Head.apply(hidden, weight, targets, bias, rules, wanted)
    return TokenLogps(
        logps,
        entropy if entropies else None,
        mean if means else None,
        collision if collisions else None,
    )


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        rules: Rules,
        wanted: _Wanted,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = hidden.shape[0]
        matrix = weight.to(hidden.dtype)
        lse = hidden.new_empty(rows, dtype=statistics_of(hidden))  # [K] log of the sum of exp(logits)
        logps = torch.empty_like(lse)
        entropy = torch.empty_like(lse) if wanted.entropies else lse.new_empty(0)
        mean = torch.empty_like(lse) if wanted.means else lse.new_empty(0)
        collision = torch.empty_like(lse) if wanted.collisions else lse.new_empty(0)
        buffers = Buffers(hidden, matrix, rules.chunk)
        for part in chunks(rows, rules.chunk):
            logits = buffers.logits(hidden[part], matrix, bias, rules)
            chosen = logits.gather(1, targets[part, None])[:, 0]
            if wanted.means:
                mean[part] = logits.mean(1)
            if wanted.entropies or wanted.collisions:
                lse[part] = logits.logsumexp(1)
            else:  # nobody needs the logits any more
                lse[part] = consumed_logsumexp(logits)
            logps[part] = chosen - lse[part]
            if wanted.means:
                mean[part] -= lse[part]
            if wanted.entropies or wanted.collisions:
                log_p = logits.sub_(lse[part, None])
                p = log_p.exp()
                if wanted.entropies:
                    entropy[part] = -log_p.mul_(p).sum(1)
                if wanted.collisions:  # at least 1 / V, so squares of small p may vanish
                    collision[part] = p.square_().sum(1).log_()
        ctx.rules = rules
        ctx.mark_non_differentiable(collision)
        ctx.set_materialize_grads(False)  # an answer that only a metric reads costs no backward work
        ctx.save_for_backward(hidden, weight, targets, bias, lse, entropy)
        return logps, entropy, mean, collision

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, for_logps: Tensor | None, for_entropy: Tensor | None, for_mean: Tensor | None, _: None
    ) -> tuple[Any, ...]:
        """With p the softmax: d logps = onehot - p, d mean = 1/V - p, d entropy = -p (log p + entropy)."""
        hidden, weight, targets, bias, lse, entropy = ctx.saved_tensors
        want_hidden, want_weight, _, want_bias, _, _ = ctx.needs_input_grad
        gradients = Gradients(hidden, weight, bias, ctx.rules, (want_hidden, want_weight, want_bias))
        pull = torch.zeros_like(lse)  # [K] what multiplies -p in every entry of a row
        for gradient in (for_logps, for_mean):
            if gradient is not None:
                pull += gradient
        for part in chunks(hidden.shape[0], ctx.rules.chunk):
            logits, softcap_slopes = gradients.logits(part)
            log_p = logits.sub_(lse[part, None])
            if for_entropy is None:
                slopes = log_p.exp_().mul_(-pull[part, None])
            else:
                slopes = (log_p + entropy[part, None]).mul_(for_entropy[part, None]).add_(pull[part, None])
                slopes.mul_(log_p.exp_()).neg_()
            if for_mean is not None:
                slopes.add_((for_mean[part] / weight.shape[0])[:, None])
            if for_logps is not None:
                slopes.scatter_add_(1, targets[part, None], for_logps[part, None])
            gradients.add(part, slopes, softcap_slopes)
        return gradients.hidden, gradients.weight, None, gradients.bias, None, None
