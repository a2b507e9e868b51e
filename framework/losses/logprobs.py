"""The language-model head in chunks: log-probabilities of given tokens, never a [tokens, vocabulary] tensor.

Knows no model and no machine. Letters: K positions, d hidden width, V vocabulary.

The forward pass keeps `hidden`, `weight` and one number per position; the backward pass multiplies
again, a chunk at a time. So at most [chunk, V] exists at any moment, in either pass. The weight is
saved as the very tensor that was handed in: a sharded model may free its storage after the forward
pass and gather it again before the backward pass, and then the parameter itself is the one thing that
still points at live numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class _Shape:
    """How raw products become logits, and which answers are wanted."""

    chunk: int
    scale: float
    softcap: float | None
    temperature: float
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

    hidden [K, d], weight [V, d], targets [K] int64, bias [V]. With z = scale * (hidden weight^T + bias)
    the logits are c tanh(z / c) where a `softcap` c is given, else z, divided by `temperature`: the
    order of the models that have all three (Gemma, Cohere, Granite).

    The product runs in `hidden`'s type; all that follows in fp32 (fp64 for fp64 inputs), and so does the
    sum of the weight's gradient over chunks. All answers but `collisions` are differentiable. K = 0 gives
    empty answers that are still part of the graph. A weight that asks for no gradient costs none. Raises
    ValueError for a chunk or a temperature that is not positive.
    """
    if chunk < 1 or temperature <= 0:
        raise ValueError(f"chunk={chunk} and temperature={temperature} must be positive")
    shape = _Shape(chunk, scale, softcap, temperature, entropies, means, collisions)
    logps, entropy, mean, collision = _Head.apply(hidden, weight, targets, bias, shape)
    return TokenLogps(
        logps,
        entropy if entropies else None,
        mean if means else None,
        collision if collisions else None,
    )


class _Buffers:
    """Room for one chunk, used again for the next: fresh memory of this size costs as much as the
    arithmetic on it, since the system hands it out page by page."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk: int) -> None:
        rows, vocabulary = min(chunk, hidden.shape[0]), weight.shape[0]
        statistics = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self._products = hidden.new_empty(rows, vocabulary)
        same = hidden.dtype == statistics
        self._logits = self._products if same else hidden.new_empty(rows, vocabulary, dtype=statistics)
        self._partial: Tensor | None = None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: _Shape) -> Tensor:
        """[rows, V] logits after scale, softcap and temperature, to be changed in place at will."""
        rows = hidden.shape[0]
        product = torch.mm(hidden, weight.t(), out=self._products[:rows])
        logits = self._logits[:rows]
        if logits.dtype != product.dtype:
            logits.copy_(product)
        if bias is not None:
            logits.add_(bias.to(logits.dtype))
        if shape.scale != 1.0:
            logits.mul_(shape.scale)
        if shape.softcap is not None:
            logits.div_(shape.softcap).tanh_().mul_(shape.softcap)
        return logits if shape.temperature == 1.0 else logits.div_(shape.temperature)

    def rounded(self, values: Tensor) -> Tensor:
        """`values` [rows, V] in the type of the model, in place of the products."""
        products = self._products[: values.shape[0]]
        return values if values.dtype == products.dtype else products.copy_(values)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total += left @ right, kept in `total`'s type even where the factors are of half precision."""
        if total.dtype == left.dtype:
            total.addmm_(left, right)
        elif total.is_cuda:
            total += torch.mm(left, right, out_dtype=total.dtype)
        else:
            if self._partial is None:
                self._partial = right.new_empty(total.shape)
            total += torch.mm(left, right, out=self._partial)


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    for start in range(0, rows, chunk):
        yield slice(start, min(start + chunk, rows))


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, shape: _Shape
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = hidden.shape[0]
        matrix = weight.to(hidden.dtype)
        statistics = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        lse = hidden.new_empty(rows, dtype=statistics)  # [K] log of the sum of exp(logits)
        logps = torch.empty_like(lse)
        entropy = torch.empty_like(lse) if shape.entropies else lse.new_empty(0)
        mean = torch.empty_like(lse) if shape.means else lse.new_empty(0)
        collision = torch.empty_like(lse) if shape.collisions else lse.new_empty(0)
        buffers = _Buffers(hidden, matrix, shape.chunk)
        for part in _chunks(rows, shape.chunk):
            logits = buffers.logits(hidden[part], matrix, bias, shape)
            chosen = logits.gather(1, targets[part, None])[:, 0]
            if shape.means:
                mean[part] = logits.mean(1)
            if shape.entropies or shape.collisions:
                lse[part] = logits.logsumexp(1)
            else:  # nobody needs the logits any more
                highest = logits.amax(1)
                lse[part] = logits.sub_(highest[:, None]).exp_().sum(1).log_().add_(highest)
            logps[part] = chosen - lse[part]
            if shape.means:
                mean[part] -= lse[part]
            if shape.entropies or shape.collisions:
                log_p = logits.sub_(lse[part, None])
                p = log_p.exp()
                if shape.entropies:
                    entropy[part] = -log_p.mul_(p).sum(1)
                if shape.collisions:  # at least 1 / V, so squares of small p may vanish
                    collision[part] = p.square_().sum(1).log_()
        ctx.shape = shape
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
        shape: _Shape = ctx.shape
        want_hidden, want_weight, _, want_bias, _ = ctx.needs_input_grad
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = lse.new_zeros(weight.shape) if want_weight else None
        grad_bias = lse.new_zeros(bias.shape) if want_bias else None
        pull = torch.zeros_like(lse)  # [K] what multiplies -p in every entry of a row
        for gradient in (for_logps, for_mean):
            if gradient is not None:
                pull += gradient
        buffers = _Buffers(hidden, matrix, shape.chunk)
        for part in _chunks(hidden.shape[0], shape.chunk):
            logits = buffers.logits(hidden[part], matrix, bias, shape)
            slope = None  # of the tanh, whose value is logits * temperature / softcap
            if shape.softcap is not None:
                slope = 1 - (logits * (shape.temperature / shape.softcap)).square_()
            log_p = logits.sub_(lse[part, None])
            if for_entropy is None:
                grad = log_p.exp_().mul_(-pull[part, None])
            else:
                grad = (log_p + entropy[part, None]).mul_(for_entropy[part, None]).add_(pull[part, None])
                grad.mul_(log_p.exp_()).neg_()
            if for_mean is not None:
                grad.add_((for_mean[part] / weight.shape[0])[:, None])
            if for_logps is not None:
                grad.scatter_add_(1, targets[part, None], for_logps[part, None])
            if slope is not None:
                grad.mul_(slope)
            if shape.scale != shape.temperature:
                grad.mul_(shape.scale / shape.temperature)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = buffers.rounded(grad)
            if grad_hidden is not None:
                torch.mm(grad, matrix, out=grad_hidden[part])
            if grad_weight is not None:
                buffers.add_product(grad_weight, grad.t(), hidden[part])
        return grad_hidden, grad_weight, None, grad_bias, None
