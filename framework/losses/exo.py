"""Efficient exact optimisation: the reverse KL between the policy's and the labels' opinion of a pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from framework.losses.answers import Answers, log_ratios, pair_metrics
from framework.losses.guard import require
from framework.losses.items import Items


def exo(policy: Answers, reference: Answers, weight: Tensor, *, beta: float, label_smoothing: float) -> Items:
    """q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e), q = s(b D), e = `label_smoothing`.

    Ji et al. 2024, arXiv 2402.00856, equation 16 for two answers: KL(policy's opinion, labels' opinion),
    where DPO takes the other direction. D is the difference of the log-ratios of the chosen and the
    rejected answer in nats, s the logistic function. b = `beta` > 0; e in (0, 0.5), 1e-3 in the paper: 0
    would make the labels certain and the divergence infinite. weight [N], 0 = not counted. Raises
    ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    require("label_smoothing", label_smoothing, above=0, below=0.5)
    chosen, rejected = log_ratios(policy, reference, weight)
    logits = beta * (chosen - rejected)
    for_chosen = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-label_smoothing))
    for_rejected = torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(label_smoothing))
    metrics = pair_metrics(policy, beta * chosen, beta * rejected)
    return Items(for_chosen + for_rejected, weight, metrics)
