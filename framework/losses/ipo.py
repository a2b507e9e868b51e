"""Identity preference optimisation, in both normalisations that go by its name.

Letters: N pairs; c and r the log-ratios of the chosen and the rejected answer in nats, n_c and n_r their
tokens, b = `beta`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from framework.losses.answers import Answers, log_ratios, pair_metrics
from framework.losses.guard import require
from framework.losses.items import Items


def ipo(
    policy: Answers,
    reference: Answers,
    weight: Tensor,
    *,
    beta: float,
    normalisation: Literal["token", "sum"],
) -> Items:
    """(h - 1 / (2b))^2 with h = c / n_c - r / n_r ("token") or h = c - r ("sum").

    Azar et al. 2023, arXiv 2310.12036, equation 17, where b is called tau. The paper writes the sum; its
    authors' runs, and TRL, take the mean over tokens, which does not grow with length. Unlike DPO it
    pulls the margin to a finite number, also where labels are certain. b > 0, typically 0.01 to 1. The two
    agree for answers of one token. Raises ValueError for a setting outside its range.
    """
    require("beta", beta, above=0)
    if normalisation not in ("token", "sum"):
        raise ValueError(f"normalisation={normalisation}; expected token or sum")
    chosen, rejected = log_ratios(policy, reference, weight)
    if normalisation == "token":
        chosen = chosen / policy.chosen_tokens.clamp(min=1)
        rejected = rejected / policy.rejected_tokens.clamp(min=1)
    loss = (chosen - rejected - 0.5 / beta).square()
    return Items(loss, weight, pair_metrics(policy, beta * chosen, beta * rejected))
