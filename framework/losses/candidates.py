"""The head's log-probabilities of several tokens a position: what a teacher says, and a student answers to.

The companion of `logprobs`, with the same head in chunks (see `head`): the forward pass keeps `hidden`,
`weight` and two numbers per position, the backward pass multiplies again. Only what is asked for is ever
[K, k]; `whole` is of all tokens. Knows no model and no machine. Letters: K positions, d hidden width, V
vocabulary, n of V tokens that take part, k candidates of the n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from framework.losses.head import Buffers, Gradients, Rules, chunks, consumed_logsumexp, statistics_of


@dataclass(frozen=True)
class _Part:
    """The distribution that candidates are looked at in."""

    vocabulary: int  # n: of the first so many tokens
    temperature: float  # that divides its logits

    def is_whole(self, weight: Tensor) -> bool:
        """Whether it is the model's own distribution."""
        return self.vocabulary == weight.shape[0] and self.temperature == 1.0


class Candidates(NamedTuple):
    """What the head answers, in nats."""

    targets: Tensor  # [K] log-probability of the targets, in the model's own distribution
    ids: Tensor  # [K, k] int64
    logps: Tensor  # [K, k] in the distribution over n tokens at its temperature


def candidate_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ids: Tensor,
    *,
    vocabulary: int | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    chunk: int = 1024,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Candidates:
    """log softmax(logits[:n] / temperature)[ids], and beside it log softmax(logits)[targets].

    hidden [K, d], weight [V, d], targets [K] int64, ids [K, k] int64 below n, bias [V]; n = `vocabulary`, by
    default V: models of one family differ in rows that pad their vocabularies.
    `head.Rules` says how logits come of the rest. Numbers as in `logprobs.token_logps`: the product in
    `hidden`'s type, the rest and the sum of the weight's gradient in fp32, or fp64 for fp64 inputs.
    Both answers are differentiable; one that nobody uses costs no backward work. Raises ValueError for a
    number out of range.
    """
    part = _part(weight, vocabulary, temperature)
    rules = Rules(chunk, scale, softcap, 1.0)
    own, logps = _Head.apply(hidden, weight, targets, ids, bias, rules, part)
    return Candidates(own, ids, logps)


@torch.no_grad()
def likeliest_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    count: int,
    *,
    vocabulary: int | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    chunk: int = 1024,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Candidates:
    """The `count` likeliest of n tokens at each position, the likeliest first.

    Shapes, types and errors as in `candidate_logps`, whose answers these are, without gradients.
    """
    part = _part(weight, vocabulary, temperature)
    if not 0 < count <= part.vocabulary:
        raise ValueError(f"count={count} is outside [1, {part.vocabulary}]")
    rules = Rules(chunk, scale, softcap, 1.0)
    found = _look(hidden, weight, targets, count, bias, rules, part)
    return Candidates(found.targets, found.ids, found.logps)


def _part(weight: Tensor, vocabulary: int | None, temperature: float) -> _Part:
    size = weight.shape[0]
    vocabulary = size if vocabulary is None else vocabulary
    if temperature <= 0 or not 0 < vocabulary <= size:
        raise ValueError(
            f"temperature={temperature} must be positive and vocabulary={vocabulary} in [1, {size}]"
        )
    return _Part(vocabulary, temperature)


class _Found(NamedTuple):
    targets: Tensor  # [K]
    ids: Tensor  # [K, k]
    logps: Tensor  # [K, k]
    lse: Tensor  # [K] log of the sum of exp of all logits
    part_lse: Tensor  # [K] likewise of the first n divided by the temperature


def _look(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    wanted: Tensor | int,
    bias: Tensor | None,
    rules: Rules,
    part: _Part,
) -> _Found:
    """Log-probabilities at the ids `wanted` [K, k], or of so many of the likeliest."""
    rows, n = hidden.shape[0], part.vocabulary
    matrix = weight.to(hidden.dtype)
    ids = targets.new_empty(rows, wanted) if isinstance(wanted, int) else wanted
    own = hidden.new_empty(rows, dtype=statistics_of(hidden))
    lse, part_lse = torch.empty_like(own), torch.empty_like(own)
    logps = own.new_empty(ids.shape)
    buffers = Buffers(hidden, matrix, rules.chunk)
    for piece in chunks(rows, rules.chunk):
        logits = buffers.logits(hidden[piece], matrix, bias, rules)
        own[piece] = logits.gather(1, targets[piece, None])[:, 0]
        if isinstance(wanted, int):
            logps[piece], ids[piece] = logits[:, :n].topk(wanted, dim=1)
        else:
            torch.gather(logits, 1, ids[piece], out=logps[piece])
        if part.is_whole(weight):
            lse[piece] = part_lse[piece] = consumed_logsumexp(logits)
        else:
            lse[piece] = logits.logsumexp(1)
            part_lse[piece] = consumed_logsumexp(logits[:, :n].div_(part.temperature))
            logps[piece] /= part.temperature
    return _Found(own.sub_(lse), ids, logps.sub_(part_lse[:, None]), lse, part_lse)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ids: Tensor,
        bias: Tensor | None,
        rules: Rules,
        part: _Part,
    ) -> tuple[Tensor, Tensor]:
        found = _look(hidden, weight, targets, ids, bias, rules, part)
        ctx.rules, ctx.part = rules, part
        ctx.set_materialize_grads(False)  # an answer that only a metric reads costs no backward work
        ctx.save_for_backward(hidden, weight, targets, ids, bias, found.lse, found.part_lse)
        return found.targets, found.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_own: Tensor | None, for_logps: Tensor | None) -> tuple[Any, ...]:
        """With p the softmax and q that of the n at temperature T: d own = onehot - p, and d logps[j] =
        (onehot_j - q) / T."""
        hidden, weight, targets, ids, bias, lse, part_lse = ctx.saved_tensors
        want_hidden, want_weight, _, _, want_bias, _, _ = ctx.needs_input_grad
        part: _Part = ctx.part
        gradients = Gradients(hidden, weight, bias, ctx.rules, (want_hidden, want_weight, want_bias))
        own_pull, part_pull = torch.zeros_like(lse), torch.zeros_like(lse)  # [K] what multiplies -p and -q
        if for_own is not None:
            own_pull += for_own
        if for_logps is not None:
            for_logps = for_logps / part.temperature
            part_pull += for_logps.sum(1)
        for piece in chunks(hidden.shape[0], ctx.rules.chunk):
            logits, softcap_slopes = gradients.logits(piece)
            if part.is_whole(weight):  # p = q
                slopes = logits.sub_(lse[piece, None]).exp_().mul_(-(own_pull + part_pull)[piece, None])
            else:
                own = None
                if for_own is not None:
                    own = (logits - lse[piece, None]).exp_().mul_(-own_pull[piece, None])
                first = logits[:, : part.vocabulary].div_(part.temperature)
                first.sub_(part_lse[piece, None]).exp_().mul_(-part_pull[piece, None])
                logits[:, part.vocabulary :] = 0
                slopes = logits if own is None else logits.add_(own)
            if for_own is not None:
                slopes.scatter_add_(1, targets[piece, None], for_own[piece, None])
            if for_logps is not None:
                slopes.scatter_add_(1, ids[piece], for_logps[piece])
            gradients.add(piece, slopes, softcap_slopes)
        return gradients.hidden, gradients.weight, None, None, gradients.bias, None, None
