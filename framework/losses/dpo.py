"""Direct preference optimisation: its links (logistic, robust, hinge), lengths and divergences.

Letters: N pairs; c and r the log-ratios log pi(y) - log ref(y) of the chosen and the rejected answer in
nats, D = c - r, b = `beta`, e = `label_smoothing`, s the logistic function.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from framework.losses.answers import Answers, log_ratios, pair_metrics
from framework.losses.guard import counted, require
from framework.losses.items import Items

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

EXPONENT_LIMIT = 80.0
"""exp(80) = 5.5e34 leaves room in fp32 for a coefficient and a difference; beyond it a slope is 0."""


def dpo(
    policy: Answers,
    reference: Answers,
    weight: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> Items:
    """-(1 - e) log s(b D) - e log s(-b D).

    Rafailov et al. 2023, arXiv 2305.18290, equation 7. e in [0, 0.5) is the share of labels believed to be
    flipped (conservative DPO; Mitchell 2023, "A note on DPO with noisy preferences"); 0 is plain DPO. With
    another `divergence` than the reverse KL, D is the difference of `divergence_scores` (Wang et al. 2023,
    arXiv 2309.16240). b > 0, typically 0.01 to 0.5: small lets the policy go far from the reference.
    weight [N], 0 = not counted. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    chosen, rejected = log_ratios(policy, reference, weight)
    scores = [divergence_scores(x, divergence, alpha) for x in (chosen, rejected)]
    loss = logistic(beta * (scores[0] - scores[1]), label_smoothing)
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))


def robust(
    policy: Answers, reference: Answers, weight: Tensor, *, beta: float, label_smoothing: float
) -> Items:
    """[-(1 - e) log s(b D) + e log s(-b D)] / (1 - 2e).

    Its mean over labels flipped with probability e is DPO's loss on the true ones (Chowdhury et al. 2024,
    arXiv 2403.00409). It can be negative and has no lower bound. e in [0, 0.5), 0 is DPO;
    b > 0. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    require("label_smoothing", label_smoothing, least=0, below=0.5)
    chosen, rejected = log_ratios(policy, reference, weight)
    logits = beta * (chosen - rejected)
    clean = -(1.0 - label_smoothing) * logsigmoid(logits)
    flipped = -label_smoothing * logsigmoid(-logits)
    loss = (clean - flipped) / (1.0 - 2.0 * label_smoothing)
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))


def hinge(policy: Answers, reference: Answers, weight: Tensor, *, beta: float) -> Items:
    """max(0, 1 - b D): a pair told apart by more than 1 / b nats teaches nothing more.

    The calibration loss of SLiC (Zhao et al. 2023, arXiv 2305.10425) on DPO's log-ratios, as in RSO (Liu
    et al. 2023, arXiv 2309.06657). b > 0. Raises ValueError otherwise.
    """
    require("beta", beta, above=0)
    chosen, rejected = log_ratios(policy, reference, weight)
    loss = torch.relu(1.0 - beta * (chosen - rejected))
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))


def dpo_norm(
    policy: Answers, reference: Answers, weight: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Items:
    """-(1 - e) log s(x) - e log s(-x) with x = b (c / n_c - r / n_r): log-ratios per token.

    A long answer then counts no more than a short one (Lambert et al. 2024, arXiv 2411.15124).
    b > 0 works on nats per token and is larger than DPO's, typically 2 to 10; e in [0, 0.5). Equals `dpo`
    where every answer is one token long. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    chosen, rejected = log_ratios(policy, reference, weight)
    chosen = chosen / policy.chosen_tokens.clamp(min=1)
    rejected = rejected / policy.rejected_tokens.clamp(min=1)
    loss = logistic(beta * (chosen - rejected), label_smoothing)
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))


def odpo(
    policy: Answers, reference: Answers, weight: Tensor, margin: Tensor, *, beta: float, margin_scale: float
) -> Items:
    """-log s(b D - a m): the chosen answer must win by `margin` m [N] times a = `margin_scale`.

    DPO with an offset (Amini et al. 2024, arXiv 2402.10571). b > 0, a >= 0; a = 0, or data
    without margins, is DPO. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    require("margin_scale", margin_scale, least=0)
    chosen, rejected = log_ratios(policy, reference, weight)
    (margin,) = counted(weight, margin)
    loss = -logsigmoid(beta * (chosen - rejected) - margin_scale * margin)
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))


def logistic(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x) of `logits` x [N]; e in [0, 0.5), ValueError otherwise."""
    require("label_smoothing", label_smoothing, least=0, below=0.5)
    if label_smoothing == 0.0:
        return -logsigmoid(logits)
    return -(1.0 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def divergence_scores(log_ratio: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """f'(u) of the ratio u = pi / ref, up to constants that cancel between two answers; log_ratio [N] nats.

    reverse_kl: log u. forward_kl: 1 - 1/u. js: log(2u / (1 + u)). alpha: (u^(a-1) - 1) / (a - 1) with a =
    `alpha` in [0, 1], which is forward_kl at 0 and reverse_kl at 1 (Wang et al. 2023, arXiv 2309.16240,
    whose alpha is 1 - a). Exponents stop at `EXPONENT_LIMIT`. Raises ValueError for an unknown
    divergence or a outside its range.
    """
    require("alpha", alpha, least=0, most=1)
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "forward_kl":
        return -torch.expm1((-log_ratio).clamp(max=EXPONENT_LIMIT))
    if divergence == "js":
        return math.log(2.0) + logsigmoid(log_ratio)
    if divergence != "alpha":
        raise ValueError(f"divergence={divergence}; expected reverse_kl, forward_kl, js or alpha")
    if alpha == 1.0:
        return log_ratio
    return torch.expm1(((alpha - 1.0) * log_ratio).clamp(max=EXPONENT_LIMIT)) / (alpha - 1.0)
