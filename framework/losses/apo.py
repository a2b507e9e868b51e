"""Anchored preference optimisation: says where each answer's likelihood should go, not only the difference.

Letters: N pairs; c and r the log-ratios of the chosen and the rejected answer in nats, b = `beta`, s the
logistic function. Without pairs: `kto.apo_zero_unpaired`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.losses.answers import Answers, log_ratios, pair_metrics
from framework.losses.guard import require
from framework.losses.items import Items


def apo_zero(policy: Answers, reference: Answers, weight: Tensor, *, beta: float) -> Items:
    """1 - s(b c) + s(b r): chosen answers up, rejected ones down, seen from the reference.

    For chosen answers that are better than what the model writes by itself (D'Oosterlinck et al. 2024, arXiv
    2408.06266, equation 7). b > 0, ValueError otherwise; weight [N], 0 = not counted.
    """
    require("beta", beta, above=0)
    chosen, rejected = log_ratios(policy, reference, weight)
    loss = torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))


def apo_down(policy: Answers, reference: Answers, weight: Tensor, *, beta: float) -> Items:
    """s(b c) + 1 - s(b (c - r)): both answers down, the rejected one more.

    For chosen answers that are worse than what the model writes by itself (D'Oosterlinck et al. 2024, arXiv
    2408.06266, equation 8). b > 0, ValueError otherwise; weight [N], 0 = not counted.
    """
    require("beta", beta, above=0)
    chosen, rejected = log_ratios(policy, reference, weight)
    loss = torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))
