"""Alignment by optimal transport: the distribution of rewards of chosen answers above that of rejected ones.

Compares numbers of the same rank in the whole optimizer step. The ranks come from the stage, which sees
all pairs of the world; here they are plain inputs, so the loss is additive. Letters: N pairs, b = `beta`.
"""

from __future__ import annotations

from torch import Tensor

from framework.losses.answers import Answers, log_ratios, pair_metrics
from framework.losses.dpo import logistic
from framework.losses.guard import counted, require
from framework.losses.items import Items


def aot(
    policy: Answers,
    reference: Answers,
    weight: Tensor,
    matched: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Items:
    """-(1 - e) log s(b d) - e log s(-b d), d = log pi(chosen) - log pi(rejected) - m.

    Melnyk et al. 2024, arXiv 2406.05882, paired form: the policy's differences should dominate the
    reference's as distributions. m = `matched` [N] is the reference's difference that has among all
    reference differences of the step the rank that this pair has among the policy's; with this pair's own
    in its place it is `dpo`. `reference` serves the metrics. b > 0, e = `label_smoothing` in [0, 0.5);
    weight [N], 0 = not counted. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    own, other, target = counted(weight, policy.chosen, policy.rejected, matched)
    chosen, rejected = log_ratios(policy, reference, weight)
    loss = logistic(beta * (own - other - target.detach()), label_smoothing)
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))


def aot_unpaired(
    policy: Answers,
    reference: Answers,
    weight: Tensor,
    matched_rejected: Tensor,
    matched_chosen: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Items:
    """f(c_k - r_k) over ranks k, f(d) = -(1 - e) log s(b d) - e log s(-b d), c and r sorted by themselves.

    Melnyk et al. 2024, arXiv 2406.05882, unpaired form; c and r are the log-ratios of chosen and rejected
    answers. Pair n stands for the rank of its chosen answer and for that of its rejected one:
    `matched_rejected` [N] is the rejected log-ratio of the rank of its chosen one, `matched_chosen` [N] the
    chosen log-ratio of the rank of its rejected one, both constant. The value is half the sum of the two
    losses, the gradient that of both, so that every log-ratio gets the slope of its own rank. b > 0,
    e = `label_smoothing` in [0, 0.5); weight [N]. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    chosen, rejected = log_ratios(policy, reference, weight)
    below, above = (x.detach() for x in counted(weight, matched_rejected, matched_chosen))
    both = logistic(beta * (chosen - below), label_smoothing)
    both = both + logistic(beta * (above - rejected), label_smoothing)
    return Items(both - 0.5 * both.detach(), weight, pair_metrics(policy, beta * chosen, beta * rejected))
