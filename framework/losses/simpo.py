"""Preference losses without a reference model: SimPO, AlphaPO and CPO.

Letters: N pairs; w and l the policy's log-probability of the chosen and the rejected answer in nats, n_w
and n_l their tokens, b = `beta`, s the logistic function.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from framework.losses.answers import Answers, pair_metrics, token_means
from framework.losses.dpo import EXPONENT_LIMIT, logistic
from framework.losses.guard import counted, require
from framework.losses.items import Items


def simpo(
    policy: Answers, weight: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Items:
    """-log s(b (w / n_w - l / n_l) - g): the mean log-probability is the reward, with a margin to win by.

    Meng et al. 2024, arXiv 2405.14734, equation 6. b > 0, in the paper 2 to 2.5; g = `gamma` >= 0, in the
    paper 0.3 b to 0.5 b. `label_smoothing` e in [0, 0.5) mixes in the flipped pair as in `dpo`. weight [N],
    0 = not counted. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    require("gamma", gamma, least=0)
    chosen, rejected = token_means(policy, weight)
    loss = logistic(beta * (chosen - rejected) - gamma, label_smoothing)
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))


def alphapo(policy: Answers, weight: Tensor, *, beta: float, gamma: float, alpha: float) -> Items:
    """-log s(b (R(w / n_w) - R(l / n_l)) - g) with R(x) = (1 - exp(-a x)) / a, a = `alpha`.

    Gupta et al. 2025, arXiv 2501.03884. a bends the reward: a -> 0 gives R(x) = x, which is
    `simpo`, and so a = 0 is taken; the paper uses -0.25 to 0.25. b > 0, g >= 0, a in [-1, 1]. The exponent
    -a x stops at `EXPONENT_LIMIT`. weight [N]. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    require("gamma", gamma, least=0)
    require("alpha", alpha, least=-1, most=1)
    chosen, rejected = (_bent(x, alpha) for x in token_means(policy, weight))
    loss = -logsigmoid(beta * (chosen - rejected) - gamma)
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))


def _bent(means: Tensor, alpha: float) -> Tensor:
    if alpha == 0.0:
        return means
    return -torch.expm1((-alpha * means).clamp(max=EXPONENT_LIMIT)) / alpha


def cpo(
    policy: Answers,
    weight: Tensor,
    tokens_per_pair: float,
    *,
    beta: float,
    nll: float,
    label_smoothing: float = 0.0,
) -> Items:
    """-log s(b (w - l)) - a w / n: DPO with a uniform reference, held up by the chosen answer's likelihood.

    Xu et al. 2024, arXiv 2401.08417. n = `tokens_per_pair` is the mean number of trained
    tokens of a chosen answer over the whole optimizer step, so that the mean over pairs of the second term
    is a = `nll` times the mean over tokens. b > 0, a >= 0; `label_smoothing` as in `dpo`. weight [N].
    Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    require("nll", nll, least=0)
    chosen, rejected = counted(weight, policy.chosen, policy.rejected)
    preference = logistic(beta * (chosen - rejected), label_smoothing)
    likelihood = -chosen / tokens_per_pair
    metrics = pair_metrics(policy, beta * chosen, beta * rejected) | {"nll": likelihood.detach()}
    return Items(preference + nll * likelihood, weight, metrics)
