"""Weights for answers that came from a sampler whose probabilities are not quite the trainer's.

An inference engine rounds otherwise than the trainer, or holds older weights; w = pi_trainer / pi_sampler of
what was drawn makes up for it, and its bounds keep the variance down (Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy RL training"). Letters: Q answer tokens, end to end.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from framework.losses.answers import segment_sums
from framework.losses.guard import require
from framework.losses.kl import LOG_RATIO_LIMIT

Level = Literal["token", "sequence", "geometric"]


def sampler_correction(
    old_logps: Tensor,
    sampler_logps: Tensor,
    segments: Tensor,
    *,
    level: Level,
    outside: Literal["truncate", "mask"],
    low: float,
    high: float,
) -> Tensor:
    """[Q] w = exp(log pi_trainer - log pi_sampler) per token, without gradient.

    level "token": each token's own ratio. "sequence": the product over the answer, right in theory, but off
    by e^5 for a thousand tokens that are wrong by half a percent each. "geometric": its n-th root, which
    fits answers of any length. outside "truncate": w is held within [low, high] (TIS); "mask": 0 where it
    leaves them (IcePop; on the levels of sequences whole answers drop out). low in [0, 1], high >= 1: 0 and
    2 for truncation, 0.5 and 5 for masking tokens. Raw token weights with whole answers masked are a product
    of two calls.

    old_logps, sampler_logps [Q] nats under the law of sampling; segments [Q] int64, the answer of each. A
    sampler log-probability of NaN means that it is not known, and the token's ratio is taken as 1. Raises
    ValueError for a setting outside its range.
    """
    require("low", low, least=0, most=1)
    require("high", high, least=1)
    log_ratio = (old_logps - sampler_logps).detach()
    log_ratio = torch.where(sampler_logps.isnan(), torch.zeros_like(log_ratio), log_ratio)
    if level in ("sequence", "geometric"):
        count = int(segments.max()) + 1 if segments.numel() else 0
        sums = segment_sums(log_ratio, segments, count)
        if level == "geometric":
            sums = sums / segment_sums(torch.ones_like(log_ratio), segments, count).clamp(min=1)
        log_ratio = sums[segments]
    elif level != "token":
        raise ValueError(f"level={level}; expected token, sequence or geometric")
    weights = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if outside == "truncate":
        return weights.clamp(low, high)
    if outside != "mask":
        raise ValueError(f"outside={outside}; expected truncate or mask")
    return torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))
