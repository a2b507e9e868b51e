"""A causal body with one number as its head: a reward model, or the critic of a policy.

Knows transformers' models, no loss and no rank. Letters: K trained positions, d hidden width.

The structure is transformers' own sequence classification with one label, so what is saved loads there.
The product with the head runs in fp32, whatever the body runs in: scores are compared and subtracted, and
bf16 would leave them three digits. In a bf16 run the head's weight is a rounded fp32 master like every
other weight, under every strategy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from framework.batch import Batch, Scores
from framework.models.policy import body, causal_lm, layers


class Scorer(nn.Module):
    """`lm` is a transformers sequence classifier with one label, plain or inside a peft model."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: Batch) -> Scores:
        """A score [K] at each of `batch.trained`: of its segment up to and including that token."""
        lm = causal_lm(self.lm)
        hidden = body(lm, batch)  # [K, d]
        # a product with a vector, not the column of one with a matrix: FSDP2 warns of views
        return Scores(torch.mv(hidden.float(), lm.score.weight.float()[0]))

    def blocks(self) -> Sequence[nn.Module]:
        """The decoder layers, in order: what is sharded, and recomputed, as a unit."""
        return layers(causal_lm(self.lm).base_model)
