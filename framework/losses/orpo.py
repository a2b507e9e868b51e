"""Odds-ratio preference optimisation: supervised fine-tuning and preference in one, without a reference.

Letters: N pairs; w and l the policy's mean log-probability per token of the chosen and rejected answer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from framework.losses.answers import Answers, pair_metrics, token_means
from framework.losses.guard import counted, require
from framework.losses.items import Items


def orpo(policy: Answers, weight: Tensor, tokens_per_pair: float, *, beta: float) -> Items:
    """NLL(chosen) - b log s(log odds(w) - log odds(l)), odds(x) = exp(x) / (1 - exp(x)).

    Hong et al. 2024, arXiv 2403.07691, equations 6 and 7, where b = `beta` > 0 is called lambda (0.1 in the
    paper); b -> 0 is supervised fine-tuning on the chosen answers. The NLL is of the answer's tokens, divided
    by n = `tokens_per_pair`, the mean number of trained tokens of a chosen answer over the whole optimizer
    step, so that its mean over pairs is the mean over tokens. weight [N], 0 = not counted. An answer of
    probability 1 has infinite odds; they stop where 1 - p is the precision of the type. Raises ValueError
    for b outside its range.
    """
    require("beta", beta, above=0)
    chosen, rejected = token_means(policy, weight)
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    (sums,) = counted(weight, policy.chosen)
    likelihood = -sums / tokens_per_pair
    metrics = pair_metrics(policy, beta * chosen, beta * rejected)
    metrics |= {"nll": likelihood.detach(), "log_odds": log_odds.detach()}
    return Items(likelihood - beta * logsigmoid(log_odds), weight, metrics)


def _log_odds(means: Tensor) -> Tensor:
    """x - log(1 - exp x) for x < 0, by expm1: 1 - exp x loses its digits where x is near 0."""
    means = means.clamp(max=-torch.finfo(means.dtype).eps)
    return means - torch.log(-torch.expm1(means))
