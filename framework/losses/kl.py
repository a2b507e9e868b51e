"""Estimates, token by token, of how far a policy is from a reference, and what holds it there.

With l = log pi(x) - log ref(x) of a token x drawn from pi, each of these has, or nearly has, the mean KL(pi,
ref); they differ in spread and above all in their gradients (Schulman 2020, "Approximating KL divergence";
Liu et al. 2025, arXiv 2510.01555). Letters: K trained positions.

              in the reward (no gradient)          as a loss on tokens drawn from pi
    k1        unbiased value and gradient          its gradient has mean 0: does nothing
    k2        biased                               gradient of KL(pi, ref), unbiased
    k3        unbiased value, biased gradient      gradient of KL(ref, pi), with large variance
    k3_plus   as k3                                value of k3, gradient of k2
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from framework.losses.guard import require

Estimator = Literal["k1", "k2", "k3", "k3_plus"]

LOG_RATIO_LIMIT = 20.0
"""Ratios stop at exp(20) = 4.9e8 and at its inverse: products of two stay finite in fp32, and beyond it a
token carries no gradient. OpenRLHF and verl stop there, too."""


def k1(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """[K] l. Unbiased, of either sign, of large variance. Right in the reward; as a loss it does nothing."""
    return logps - reference_logps


def k2(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """[K] l^2 / 2 >= 0. Biased in value, of second order in the distance; right as a loss."""
    return 0.5 * (logps - reference_logps).square()


def k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """[K] exp(-l) - 1 + l >= 0. Unbiased in value, of small variance near the reference; right to look at.

    As a loss it follows KL(ref, pi), which agrees with KL(pi, ref) to first order only. l stops at
    +-`LOG_RATIO_LIMIT` in the exponent.
    """
    log_ratio = logps - reference_logps
    return torch.expm1(-log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) + log_ratio


def k3_plus(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """[K] the value of `k3` with the gradient of `k2`: good to look at and right as a loss."""
    squared = k2(logps, reference_logps)
    return squared + (k3(logps, reference_logps) - squared).detach()


def kl(logps: Tensor, reference_logps: Tensor, estimator: Estimator) -> Tensor:
    """[K] the estimate of that name, from log-probabilities [K] in nats. ValueError for another."""
    estimators = {"k1": k1, "k2": k2, "k3": k3, "k3_plus": k3_plus}
    if estimator not in estimators:
        raise ValueError(f"estimator={estimator}; expected {', '.join(estimators)}")
    return estimators[estimator](logps, reference_logps)


def adaptive_kl(
    coefficient: float, observed: float, *, target: float, horizon: float, samples: float
) -> float:
    """The next KL coefficient: c (1 + clip(observed / target - 1, -0.2, 0.2) samples / horizon).

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2. `observed` is the mean KL of an answer in nats over
    the `samples` of an iteration, `target` > 0 what it should be; in `horizon` > 0 samples the
    coefficient may change by a fifth. Raises ValueError for a setting outside its range.
    """
    require("target", target, above=0)
    require("horizon", horizon, above=0)
    error = min(max(observed / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * samples / horizon)
