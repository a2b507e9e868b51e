"""A linear layer that remembers its parameter instead of the memory behind it, for ZeRO-3.

Knows neither DeepSpeed nor ranks: only that a weight's storage may be given back and filled again
between the forward and the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@contextlib.contextmanager
def keeping_parameters() -> Iterator[None]:
    """Every `nn.functional.linear` inside keeps its parameter for the backward pass."""
    linear = nn.functional.linear

    def keeping(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return Linear.apply(linear, input, weight, bias)

    nn.functional.linear = keeping
    try:
        yield
    finally:
        nn.functional.linear = linear


class Linear(torch.autograd.Function):
    """y = x W^T + b that keeps the parameter W for its backward pass, not the memory behind it.

    torch's own keeps a view of W: under ZeRO-3 every weight of the model, once gathered, would stay
    until the backward pass reached it. The parameter is gathered again by then. DeepSpeed's own adds
    the bias in place, which makes gradients wrong where checkpointing keeps products for later.
    """

    @staticmethod
    def forward(ctx: Any, linear: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, for_x, for_weight, *for_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
        return (
            None,
            grad @ weight if for_x else None,
            flat.t() @ x.reshape(-1, x.shape[-1]) if for_weight else None,
            *[flat.sum(0) if wanted else None for wanted in for_bias],
        )
