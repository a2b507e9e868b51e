"""Policy-gradient losses per generated token. The way of averaging and the advantages are the stage's.

PPO, GRPO, DAPO and Dr. GRPO share `ppo`: they differ in advantages, in how tokens are averaged and in the
bounds. Letters: K trained positions, S sequences; rho = pi / pi_old, A = advantage, sg() = held constant.

Every loss takes, besides what its own equation names: `weight` [K], 0 = not counted; `correction` [K], a
constant factor on the policy term (`correction.sampler_correction`); with `kl` > 0 the term kl * estimate
of the KL to `reference_logps` [K] (`kl.kl` with `kl_estimator`; `kl_importance` multiplies it by rho, which
corrects it on tokens that an older policy drew; DeepSeek-AI 2025, arXiv 2512.02556); with `entropy` > 0 the
term -entropy * H from `entropies` [K]. All log-probabilities are in nats, at the temperature of sampling.
A log-ratio stops at +-`kl.LOG_RATIO_LIMIT`. All raise ValueError for a setting outside its range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.losses.answers import segment_sums
from framework.losses.guard import choose, counted, require
from framework.losses.inputs import optional
from framework.losses.items import Items
from framework.losses.kl import LOG_RATIO_LIMIT, Estimator, k2
from framework.losses.kl import kl as estimate_kl

regularised = optional(
    reference_logps=lambda settings: settings["kl"] != 0,
    entropies=lambda settings: settings["entropy"] != 0,
)


@dataclass(frozen=True)
class _Regulariser:
    """What is added to a policy term: KL and entropy, with their inputs."""

    reference_logps: Tensor | None
    entropies: Tensor | None
    kl: float
    kl_estimator: Estimator
    kl_importance: bool
    entropy: float

    def items(
        self,
        loss: Tensor,
        weight: Tensor,
        logps: Tensor,
        ratio: Tensor,
        correction: Tensor | None,
        metrics: Mapping[str, Tensor],
    ) -> Items:
        """The policy term `loss` [K] times `correction`, plus these terms."""
        require("kl", self.kl, least=0)
        require("entropy", self.entropy, least=0)
        reported = dict(metrics)
        if correction is not None:
            loss = loss * counted(weight, correction)[0].detach()
        if self.reference_logps is not None:
            (reference,) = counted(weight, self.reference_logps)
            distance = estimate_kl(logps, reference, self.kl_estimator)
            reported["kl"] = distance.detach()
            if self.kl > 0:
                loss = loss + self.kl * (distance * ratio if self.kl_importance else distance)
        elif self.kl > 0:
            raise ValueError(f"kl={self.kl} needs reference_logps")
        if self.entropies is not None:
            (entropies,) = counted(weight, self.entropies)
            reported["entropy"] = entropies.detach()
            if self.entropy > 0:
                loss = loss - self.entropy * entropies
        elif self.entropy > 0:
            raise ValueError(f"entropy={self.entropy} needs entropies")
        return Items(loss, weight, reported)


@regularised
def ppo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    weight: Tensor,
    correction: Tensor | None = None,
    reference_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    kl: float = 0.0,
    kl_estimator: Estimator = "k3",
    kl_importance: bool = False,
    entropy: float = 0.0,
) -> Items:
    """max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A), and at most -c A where A < 0.

    Schulman et al. 2017, arXiv 1707.06347, equation 7. clip_low in (0, 1), clip_high > 0: 0.2 both; DAPO's
    clip-higher has 0.28 above (Yu et al. 2025, arXiv 2503.14476). c = `dual_clip` > 1 + clip_high, 3 as a
    rule (Ye et al. 2019, arXiv 1912.09729), bounds the loss of tokens with A < 0 whose probability grew; it
    has the value and gradient of INTELLECT-2's two-sided clip with delta = c (2025, arXiv 2505.07291). None:
    no bound. Where pi = pi_old the gradient is that of `reinforce`.
    """
    logps, old_logps, advantages = counted(weight, logps, old_logps, advantages)
    _bounds(clip_low, clip_high)
    if dual_clip is not None:
        require("dual_clip", dual_clip, above=1 + clip_high)
    ratio = _ratio(logps - old_logps)
    loss, metrics = _clipped(ratio, advantages, clip_low, clip_high, dual_clip)
    metrics |= _moved(ratio, logps, old_logps)
    terms = _Regulariser(reference_logps, entropies, kl, kl_estimator, kl_importance, entropy)
    return terms.items(loss, weight, logps, ratio, correction, metrics)


@regularised
def gspo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    weight: Tensor,
    segments: Tensor,
    correction: Tensor | None = None,
    reference_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    *,
    clip_low: float,
    clip_high: float,
    kl: float = 0.0,
    kl_estimator: Estimator = "k3",
    kl_importance: bool = False,
    entropy: float = 0.0,
) -> Items:
    """`ppo` with one ratio a sequence, the geometric mean of its tokens': exp(mean_t log rho_t).

    Zheng et al. 2025, arXiv 2507.18071, equation 5. segments [K] int64 names each token's sequence, whole in
    one micro-batch. Bounds as in `ppo`, but of another size: 3e-4 below and 4e-4 above in the paper. Each
    token carries its sequence's loss, so a sequence mean (`stage.averaging=sequence`) is the paper's
    objective, and a sum over tokens is LUSPO's.
    """
    logps, old_logps, advantages = counted(weight, logps, old_logps, advantages)
    _bounds(clip_low, clip_high)
    ratio = _ratio(_over_segments(logps - old_logps, weight, segments, mean=True))
    loss, metrics = _clipped(ratio, advantages, clip_low, clip_high, None)
    metrics |= _moved(ratio, logps, old_logps)
    terms = _Regulariser(reference_logps, entropies, kl, kl_estimator, kl_importance, entropy)
    return terms.items(loss, weight, logps, ratio, correction, metrics)


@regularised
def rloo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    weight: Tensor,
    segments: Tensor,
    correction: Tensor | None = None,
    reference_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    *,
    clip_low: float,
    clip_high: float,
    kl: float = 0.0,
    kl_estimator: Estimator = "k3",
    kl_importance: bool = False,
    entropy: float = 0.0,
) -> Items:
    """`ppo` with the ratio of whole sequences, the product of their tokens' ratios.

    REINFORCE with leave-one-out advantages (Ahmadian et al. 2024, arXiv 2402.14740), which takes an answer
    as one action, clipped for use over more than one update as TRL does. segments [K] int64 as in `gspo`.
    clip_low in (0, 1), clip_high > 0; the ratio of a long answer leaves such bounds after small changes of
    its tokens. Each token carries its sequence's loss (`stage.averaging=sequence`).
    """
    logps, old_logps, advantages = counted(weight, logps, old_logps, advantages)
    _bounds(clip_low, clip_high)
    ratio = _ratio(_over_segments(logps - old_logps, weight, segments, mean=False))
    loss, metrics = _clipped(ratio, advantages, clip_low, clip_high, None)
    metrics |= _moved(ratio, logps, old_logps)
    terms = _Regulariser(reference_logps, entropies, kl, kl_estimator, kl_importance, entropy)
    return terms.items(loss, weight, logps, ratio, correction, metrics)


@regularised
def gmpo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    weight: Tensor,
    segments: Tensor,
    correction: Tensor | None = None,
    reference_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    *,
    clip_low: float,
    clip_high: float,
    kl: float = 0.0,
    kl_estimator: Estimator = "k3",
    kl_importance: bool = False,
    entropy: float = 0.0,
) -> Items:
    """-A exp(mean_t m_t), m_t = min(log rho_t, clip_high) where A > 0 and max(log rho_t, -clip_low) else.

    Geometric-mean policy optimisation (Zhao et al. 2025, arXiv 2507.20673): tokens are clipped one by one,
    in the logarithm, before the mean, so that one outlier cannot switch a sequence off. clip_low, clip_high
    > 0, both 0.4 in the paper. segments [K] as in `gspo`, and so is the averaging.
    """
    logps, old_logps, advantages = counted(weight, logps, old_logps, advantages)
    require("clip_low", clip_low, above=0)
    require("clip_high", clip_high, above=0)
    log_ratio = logps - old_logps
    gains = advantages > 0
    clipped = torch.where(gains, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))
    ratio = _ratio(_over_segments(clipped, weight, segments, mean=True))
    metrics = _clip_shares(log_ratio, advantages, -clip_low, clip_high)
    metrics |= _moved(ratio, logps, old_logps)
    terms = _Regulariser(reference_logps, entropies, kl, kl_estimator, kl_importance, entropy)
    return terms.items(-ratio * advantages, weight, logps, ratio, correction, metrics)


@regularised
def cispo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    weight: Tensor,
    correction: Tensor | None = None,
    reference_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    *,
    ratio_low: float,
    ratio_high: float,
    kl: float = 0.0,
    kl_estimator: Estimator = "k3",
    kl_importance: bool = False,
    entropy: float = 0.0,
) -> Items:
    """-sg(clip(rho, ratio_low, ratio_high)) A log pi: the weight is clipped, and no token loses its gradient.

    MiniMax 2025, arXiv 2506.13585, equation 4. The bounds are of the ratio itself, not its distance from 1:
    ratio_low in [0, 1], 0 = none as in the paper; ratio_high > 1, 5 as a rule.
    """
    logps, old_logps, advantages = counted(weight, logps, old_logps, advantages)
    require("ratio_low", ratio_low, least=0, most=1)
    require("ratio_high", ratio_high, above=1)
    ratio = _ratio(logps - old_logps)
    bounded = ratio.detach().clamp(ratio_low, ratio_high)
    metrics = {
        "clip/low": (ratio.detach() < ratio_low).to(logps.dtype),
        "clip/high": (ratio.detach() > ratio_high).to(logps.dtype),
    }
    metrics |= _moved(ratio, logps, old_logps)
    terms = _Regulariser(reference_logps, entropies, kl, kl_estimator, kl_importance, entropy)
    return terms.items(-bounded * advantages * logps, weight, logps, ratio, correction, metrics)


@regularised
def sapo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    weight: Tensor,
    correction: Tensor | None = None,
    reference_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    *,
    tau_positive: float,
    tau_negative: float,
    kl: float = 0.0,
    kl_estimator: Estimator = "k3",
    kl_importance: bool = False,
    entropy: float = 0.0,
) -> Items:
    """-(4 / t) s(t (rho - 1)) A, t = tau_positive where A > 0 and tau_negative else, s the logistic function.

    Soft adaptive policy optimisation (Gao et al. 2025, arXiv 2511.20347): a smooth gate in place of a clip.
    At rho = 1 its slope is A, as in `ppo`; away from it the slope fades, the sooner the larger t > 0: 1.0
    and 1.05 in the paper.
    """
    logps, old_logps, advantages = counted(weight, logps, old_logps, advantages)
    require("tau_positive", tau_positive, above=0)
    require("tau_negative", tau_negative, above=0)
    ratio = _ratio(logps - old_logps)
    tau = choose(advantages > 0, tau_positive, tau_negative, logps.dtype)
    gate = torch.sigmoid(tau * (ratio - 1.0))
    slope = (4.0 * gate * (1.0 - gate)).detach()  # what is left of the gradient of rho
    metrics = {"gate": slope} | _moved(ratio, logps, old_logps)
    terms = _Regulariser(reference_logps, entropies, kl, kl_estimator, kl_importance, entropy)
    return terms.items(-4.0 / tau * gate * advantages, weight, logps, ratio, correction, metrics)


@regularised
def reinforce(
    logps: Tensor,
    advantages: Tensor,
    weight: Tensor,
    correction: Tensor | None = None,
    reference_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    *,
    kl: float = 0.0,
    kl_estimator: Estimator = "k3",
    kl_importance: bool = False,
    entropy: float = 0.0,
) -> Items:
    """-A log pi: for answers that the policy itself drew, one update an iteration (Williams 1992).

    Nothing holds a second update on the same answers back; use `ppo` for that.
    """
    logps, advantages = counted(weight, logps, advantages)
    ratio = torch.exp(logps - logps.detach())  # 1, with the gradient of the score
    terms = _Regulariser(reference_logps, entropies, kl, kl_estimator, kl_importance, entropy)
    return terms.items(-advantages * logps, weight, logps, ratio, correction, {})


def _bounds(clip_low: float, clip_high: float) -> None:
    require("clip_low", clip_low, above=0, below=1)
    require("clip_high", clip_high, above=0)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _moved(ratio: Tensor, logps: Tensor, old_logps: Tensor) -> dict[str, Tensor]:
    """How far the policy has moved since the answers were drawn; `approx_kl` in nats per token (k2)."""
    return {"ratio": ratio.detach(), "approx_kl": k2(logps, old_logps).detach()}


def _clipped(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """[K] the clipped surrogate, and the shares of tokens that a bound holds."""
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(-ratio * advantages, -bounded * advantages)
    metrics = _clip_shares(ratio.detach(), advantages, 1.0 - clip_low, 1.0 + clip_high)
    if dual_clip is not None:
        losing = advantages < 0
        metrics["clip/dual"] = (losing & (ratio.detach() > dual_clip)).to(ratio.dtype)
        loss = torch.where(losing, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss, metrics


def _clip_shares(ratio: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """1 where clipping took the gradient away: too unlikely already (low), or too likely (high)."""
    ratio = ratio.detach()
    return {
        "clip/low": ((advantages < 0) & (ratio < low)).to(ratio.dtype),
        "clip/high": ((advantages > 0) & (ratio > high)).to(ratio.dtype),
    }


def _over_segments(values: Tensor, weight: Tensor, segments: Tensor, *, mean: bool) -> Tensor:
    """[K] the sum or mean of `values` [K] over the counted tokens of each token's sequence."""
    count = int(segments.max()) + 1 if segments.numel() else 0
    sums = segment_sums(values, segments, count)
    if mean:
        sums = sums / segment_sums((weight > 0).to(values.dtype), segments, count).clamp(min=1)
    return sums[segments]
