"""Self-play preference optimisation with hard labels."""

from __future__ import annotations

from torch import Tensor

from framework.losses.answers import Answers, log_ratios, pair_metrics
from framework.losses.guard import require
from framework.losses.items import Items


def sppo(policy: Answers, reference: Answers, weight: Tensor, *, beta: float) -> Items:
    """(c - 1 / (2b))^2 + (r + 1 / (2b))^2: each answer's log-ratio is pulled to +-1 / (2b) nats.

    Wu et al. 2024, arXiv 2405.00675, equation 4.7 with the probability of winning 1 for the chosen and 0 for
    the rejected answer; c and r are their log-ratios log pi - log ref. b = `beta` > 0, where the paper's eta
    is 1 / b: small b means far targets. weight [N], 0 = not counted. Raises ValueError for b out of range.
    """
    require("beta", beta, above=0)
    chosen, rejected = log_ratios(policy, reference, weight)
    loss = (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))
