"""DiscoPOP: the log-ratio modulated loss that a language model found when asked to invent objectives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from framework.losses.answers import Answers, log_ratios, pair_metrics
from framework.losses.guard import require
from framework.losses.items import Items


def discopop(policy: Answers, reference: Answers, weight: Tensor, *, beta: float, tau: float) -> Items:
    """-(1 - q) log s(x) + q exp(-x), x = b D, q = s(x / t), t = `tau`.

    Lu et al. 2024, arXiv 2406.08414, equation 5: DPO where the pair is told apart wrongly, an exponential
    loss where it is right. D is the difference of the log-ratios of the chosen and the rejected answer in
    nats, s the logistic function. b = `beta` > 0; t in (0, 1], 0.05 in the paper. The second term is
    computed as exp(log q - x), which is at most 1 for such t: exp(-x) alone would overflow where q is 0.
    weight [N], 0 = not counted. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    require("tau", tau, above=0, most=1)
    chosen, rejected = log_ratios(policy, reference, weight)
    logits = beta * (chosen - rejected)
    logistic = -torch.sigmoid(-logits / tau) * logsigmoid(logits)
    exponential = torch.exp(logsigmoid(logits / tau) - logits)
    return Items(logistic + exponential, weight, pair_metrics(policy, beta * chosen, beta * rejected))
