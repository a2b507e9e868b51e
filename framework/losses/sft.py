"""Losses of supervised fine-tuning: one number per trained token. Letters: K trained tokens, N pairs.

Averages are not made here: the trainer divides by the number of trained tokens of the whole step.
"""

from __future__ import annotations

from torch import Tensor

from framework.losses.answers import Answers
from framework.losses.guard import counted, require
from framework.losses.inputs import optional
from framework.losses.items import Items


@optional(mean_logps=lambda settings: settings["label_smoothing"] != 0)
def sft(
    logps: Tensor, weight: Tensor, mean_logps: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Items:
    """Cross-entropy of the trained tokens: -(1 - e) log p(x_t | x_<t) - e mean_v log p(v | x_<t).

    logps [K] nats; weight [K], 0 = not counted; mean_logps [K] nats, the mean over the vocabulary,
    used only where e = `label_smoothing` in [0, 1) is not 0 (Szegedy et al. 2016, section 7, with a
    uniform prior). e = 0 is maximum likelihood. The metric `nll` is the unsmoothed loss in nats.
    Raises ValueError for e outside its range, or above 0 without `mean_logps`.
    """
    require("label_smoothing", label_smoothing, least=0, below=1)
    nll = -logps
    if label_smoothing == 0.0:
        return Items(nll, weight)
    if mean_logps is None:
        raise ValueError("label_smoothing needs mean_logps, the mean log-probability over the vocabulary")
    loss = (1.0 - label_smoothing) * nll - label_smoothing * mean_logps
    return Items(loss, weight, {"nll": nll.detach()})


def dft(logps: Tensor, weight: Tensor) -> Items:
    """Dynamic fine-tuning: each token's cross-entropy times its own probability, held constant.

    -sg(p_t) log p_t, whose gradient in log p_t is -p_t: tokens that the model finds impossible no
    longer dominate (Wu et al. 2025, arXiv 2508.05629). logps [K] fp32 nats,
    so that p_t of a hard token does not vanish as it would in bf16; weight [K], 0 = not counted.
    The metric `nll` is the plain cross-entropy in nats.
    """
    (logps,) = counted(weight, logps)
    probabilities = logps.detach().clamp(max=0).exp()  # rounding may leave a log-probability above 0
    return Items(-probabilities * logps, weight, {"nll": -logps.detach()})


def chosen_sft(policy: Answers, weight: Tensor, tokens_per_pair: float) -> Items:
    """-log pi(chosen) / n: supervised fine-tuning on the chosen answers of N pairs, as one term of a mixture.

    policy.chosen [N] nats; n = `tokens_per_pair` is the mean number of trained tokens of a chosen answer
    over the whole optimizer step, so that the mean over pairs is the mean over tokens; weight [N], 0 = not
    counted.
    """
    return Items(-policy.chosen / tokens_per_pair, weight)
