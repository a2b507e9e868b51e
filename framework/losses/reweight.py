"""Supervised losses that ask the start model which text is near to what it knows; the rest is learnt less.

What is far from the start model moves it most, so these forget less, without any data to rehearse. Letters: K
trained tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.losses.guard import counted, require
from framework.losses.items import Items


def stm(logps: Tensor, weight: Tensor, start_logps: Tensor, *, most_nats: float) -> Items:
    """Selective token masking: -log p of the tokens that the start model gave a loss of at most `most_nats`.

    Wu et al. 2025, arXiv 2501.14315, who limit a token's perplexity: 0.92 nats are one of 2.5. logps and
    start_logps [K] nats, the start model's held constant; weight [K], 0 = not counted. Masked tokens stay in
    the denominator, so fewer tokens left mean a smaller gradient, not a larger one for each. most_nats > 0;
    infinite is `sft`. The metrics `nll` and `unmasked` are of all tokens. Raises ValueError for a limit
    outside its range.
    """
    require("most_nats", most_nats, above=0)
    (logps,) = counted(weight, logps)
    kept = (-start_logps <= most_nats).to(logps.dtype)
    return Items(-logps * kept, weight, {"nll": -logps.detach(), "unmasked": kept})


def flow(logps: Tensor, weight: Tensor, sample_weights: Tensor) -> Items:
    """-w log p, w the weight of a token's sample: large where the start model has a small loss on it (FLOW).

    Sanyal et al. 2025, arXiv 2502.02797: w is proportional to exp(-l / tau), l being the start model's mean
    loss over the sample's trained tokens; here tau is the median of l over samples, and the mean of w over
    samples is 1. logps and sample_weights [K]; weight [K], 0 = not counted. The metric `nll` is without w.
    """
    logps, sample_weights = counted(weight, logps, sample_weights)
    return Items(-sample_weights * logps, weight, {"nll": -logps.detach()})


def sample_weights(nats: Tensor, median: float, mean: float) -> Tensor:
    """[n] fp64: exp(-l / tau) / mean, l = `nats` [n], tau = `median`; `mean` is that of the exponentials."""
    return torch.exp(-nats.double() / median) / mean
