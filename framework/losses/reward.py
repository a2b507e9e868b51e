"""Losses of reward models: scores of two answers, and which of them was liked. Letters: N pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from framework.losses.guard import counted, require
from framework.losses.items import Items


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    weight: Tensor,
    margin: Tensor | None = None,
    *,
    centring: float = 0.0,
) -> Items:
    """-log s(r_c - r_r - m) + a (r_c + r_r)^2.

    Bradley and Terry 1952 as in Ouyang et al. 2022, arXiv 2203.02155, equation 1, with the margin m of
    Touvron et al. 2023, arXiv 2307.09288, equation 2. The first term knows scores up to a constant only; a =
    `centring` >= 0, 0.01 as a rule, holds them around 0 (Eisenstein et al. 2023, arXiv 2312.09244). chosen,
    rejected [N] scores; margin [N] in units of the score, 0 where the data says nothing; weight [N], 0 = not
    counted, 1 / C(k, 2) for the pairs of a ranking of k answers (arXiv 2203.02155, section 3.5). Differences
    are taken in fp32. Raises ValueError for a outside its range.
    """
    require("centring", centring, least=0)
    own, other = counted(weight, chosen, rejected)
    if own.dtype != torch.float64:
        own, other = own.float(), other.float()
    ahead = own - other
    wanted = ahead if margin is None else ahead - counted(weight, margin)[0]
    loss = -logsigmoid(wanted)
    if centring:
        loss = loss + centring * (own + other).square()
    ahead = ahead.detach()
    metrics = {
        "rewards/chosen": own.detach(),
        "rewards/rejected": other.detach(),
        "rewards/margin": ahead,
        "rewards/accuracy": (ahead > 0).to(ahead.dtype),
    }
    return Items(loss, weight, metrics)
