"""Losses of single answers that were liked or not, against a baseline: KTO, and APO's without one.

Letters: S answers; r the log-ratio log pi(y) - log ref(y) in nats, b = `beta`, s the logistic function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.losses.guard import choose, counted, require
from framework.losses.items import Items


def kto(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    weight: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Items:
    """w_d (1 - s(b (r - z))) for desirable answers, w_u (1 - s(b (z - r))) for the others.

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 7. policy, reference [S] nats, summed over
    the answer; desirable [S] bool; weight [S], 0 = not counted; baseline z, one number from `kto_baseline`,
    held constant. b > 0, typically 0.1; w_d, w_u >= 0, best with w_d n_d : w_u n_u between 1 and 4/3.
    With z = 0 it is `apo_zero_unpaired`. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    require("desirable_weight", desirable_weight, least=0)
    require("undesirable_weight", undesirable_weight, least=0)
    own, start = counted(weight, policy, reference)
    rewards = beta * (own - start)
    shift = beta * baseline.detach().to(rewards.dtype)
    importance = choose(desirable, desirable_weight, undesirable_weight, rewards.dtype)
    sign = choose(desirable, 1.0, -1.0, rewards.dtype)
    loss = importance * torch.sigmoid(-sign * (rewards - shift))
    return Items(loss, weight, unpaired_metrics(rewards, desirable))


def apo_zero_unpaired(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    weight: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Items:
    """w_d (1 - s(b r)) for desirable answers, w_u s(b r) for the others: `kto` with a baseline of 0.

    APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7) on answers without partners.
    Arguments, ranges and errors as in `kto`.
    """
    return kto(
        policy,
        reference,
        desirable,
        weight,
        torch.zeros((), dtype=policy.dtype, device=policy.device),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def kto_baseline(total: float, count: float) -> float:
    """z = max(0, mean log-ratio) of answers paired with other rows' prompts, in nats.

    `total` is the sum of log pi - log ref over all `count` of them in the whole optimizer step, all ranks
    and both classes: an estimate of KL(pi, ref) from answers that were not drawn for the prompt.
    """
    return max(0.0, total / count) if count > 0 else 0.0


def unpaired_metrics(rewards: Tensor, desirable: Tensor) -> dict[str, Tensor]:
    """Implicit rewards [S] by class; NaN, so not counted, in the other."""
    rewards = rewards.detach()
    absent = torch.full_like(rewards, torch.nan)
    return {
        "rewards/desirable": torch.where(desirable, rewards, absent),
        "rewards/undesirable": torch.where(desirable, absent, rewards),
    }
