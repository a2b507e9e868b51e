"""NEFTune: noise on what the embedding answers, while training (Jain et al. 2023, arXiv 2310.05914).

Uniform in +- a / sqrt(L d), for a segment of L tokens and embeddings of width d. L is the segment's own
length, not that of a padded row, so the law of the noise does not depend on how rows were cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from framework.batch import Batch


@contextlib.contextmanager
def noisy(lm: Any, batch: Batch, alpha: float | None) -> Iterator[None]:
    """Add the noise to every forward pass of `lm`'s embedding inside; None adds none.

    Drawn from torch's generator of the device, which the trainer seeds for every micro-batch.
    """
    if alpha is None:
        yield
        return
    scale = alpha * lengths(batch).rsqrt()[..., None]  # [R, T, 1]

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        noise = torch.rand_like(output, dtype=torch.float32).mul_(2).sub_(1)
        return output + (noise * (scale / output.shape[-1] ** 0.5)).to(output.dtype)

    hook = lm.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def lengths(batch: Batch) -> Tensor:
    """[R, T] fp32, tokens of the segment that each token is part of."""
    tokens = batch.boundaries.diff()
    if batch.packed:
        return torch.repeat_interleave(tokens, tokens).float()[None]
    return tokens.float()[:, None].expand(batch.input_ids.shape)
