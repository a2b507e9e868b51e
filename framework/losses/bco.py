"""Binary classifier optimisation: is this answer good, asked of one answer at a time. And its kin on pairs.

Letters: N pairs, S single answers; c and r the log-ratios of the chosen and the rejected answer in nats,
b = `beta`, s the logistic function.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from framework.losses.answers import Answers, log_ratios, pair_metrics
from framework.losses.guard import choose, counted, require
from framework.losses.inputs import running_baseline
from framework.losses.items import Items
from framework.losses.kto import unpaired_metrics


@running_baseline
def bco(
    policy: Tensor, reference: Tensor, desirable: Tensor, weight: Tensor, baseline: Tensor, *, beta: float
) -> Items:
    """-log s(b r - d) for desirable answers, -log s(-(b r - d)) for the others.

    Jung et al. 2024, arXiv 2404.04656, with the reward shift d = `baseline`, one number from
    `bco_baseline`, held constant. policy, reference [S] nats, summed over the answer; desirable [S] bool;
    weight [S], 0 = not counted. b > 0. Raises ValueError otherwise.
    """
    require("beta", beta, above=0)
    own, start = counted(weight, policy, reference)
    rewards = beta * (own - start)
    sign = choose(desirable, 1.0, -1.0, rewards.dtype)
    loss = -logsigmoid(sign * (rewards - baseline.detach().to(rewards.dtype)))
    return Items(loss, weight, unpaired_metrics(rewards, desirable))


def bco_baseline(mean: float, seen: float, total: float, count: float) -> tuple[float, float]:
    """(mean, answers seen) of the rewards b r after one more optimizer step, which updates before use.

    `mean` over the `seen` answers so far, `total` the sum over the step's `count` answers of both classes
    and all ranks. The first step gives its own mean.
    """
    if seen + count == 0:
        return 0.0, 0.0
    return mean + (total - count * mean) / (seen + count), seen + count


def bco_pair(policy: Answers, reference: Answers, weight: Tensor, *, beta: float) -> Items:
    """-log s(b c) - log s(-b r): the chosen answer is good, the rejected one is not; no shift.

    The quality term of MPO (Wang et al. 2024, arXiv 2411.10442). weight [N]; b > 0. Raises
    ValueError otherwise.
    """
    require("beta", beta, above=0)
    chosen, rejected = log_ratios(policy, reference, weight)
    loss = -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))


def nca_pair(policy: Answers, reference: Answers, weight: Tensor, *, beta: float) -> Items:
    """-log s(b c) - log s(-b c) / 2 - log s(-b r) / 2.

    Noise contrastive alignment for pairs (Chen et al. 2024, arXiv 2402.05369): the chosen
    answer's own likelihood is held up, where DPO only looks at the difference. weight [N]; b > 0. Raises
    ValueError otherwise.
    """
    require("beta", beta, above=0)
    chosen, rejected = log_ratios(policy, reference, weight)
    held = -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen)
    loss = held - 0.5 * logsigmoid(-beta * rejected)
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))
