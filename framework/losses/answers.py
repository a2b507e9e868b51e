"""From token log-probabilities to what preference losses compare: sums over a chosen and a rejected answer.

Knows no loss. Letters: K trained positions, S = 2N segments, N pairs; segments 2n and 2n + 1 are the chosen
and the rejected answer of pair n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from framework.losses.guard import counted, require


class Answers(NamedTuple):
    """Log-probabilities of the answers of N pairs under one model."""

    chosen: Tensor  # [N] nats, summed over the answer's tokens, its end included
    rejected: Tensor  # [N] nats
    chosen_tokens: Tensor  # [N] how many tokens were summed
    rejected_tokens: Tensor  # [N]


def segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """[count] sums of `values` [K] over the positions of each segment; `segments` [K] int64 < `count`.

    Added up in fp64 and returned in the type of `values`: a thousand terms in fp32 lose the digits that
    the difference of two such sums is made of. A segment without positions gives 0.
    """
    sums = torch.zeros(count, dtype=torch.float64, device=values.device)
    return sums.index_add(0, segments, values.double()).to(values.dtype)


def answer_sums(logps: Tensor, segments: Tensor, count: int, *, ld_alpha: float = 1.0) -> Answers:
    """The answers of N pairs from their tokens: logps [K] nats, segments [K] int64, count = S = 2N.

    `ld_alpha` a in [0, 1] is LD-DPO's (Liu et al. 2024, arXiv 2409.06411): with m the shorter
    of the two answers' lengths, log-probabilities past an answer's first m tokens are multiplied by a, so
    that being longer counts for less. a = 1 is plain DPO. The same a belongs to policy and reference.
    Tokens of one segment stand in their order. Raises ValueError for a outside its range.
    """
    require("ld_alpha", ld_alpha, least=0, most=1)
    ones = torch.ones_like(logps)
    tokens = segment_sums(ones, segments, count)  # [S]
    if ld_alpha != 1.0:
        pairs = tokens.view(-1, 2)
        shared = pairs.amin(1, keepdim=True).expand_as(pairs).reshape(-1)  # [S]
        tail = _places(segments, tokens) >= shared[segments]
        logps = torch.where(tail, ld_alpha * logps, logps)
    sums = segment_sums(logps, segments, count)
    return Answers(sums[0::2], sums[1::2], tokens[0::2], tokens[1::2])


def _places(segments: Tensor, tokens: Tensor) -> Tensor:
    """[K] how many positions of the same segment come before each."""
    order = segments.argsort(stable=True)
    starts = tokens.long().cumsum(0) - tokens.long()  # [S]
    places = torch.empty_like(segments)
    places[order] = torch.arange(len(segments), device=segments.device) - starts[segments[order]]
    return places


def wpo_weights(logps: Tensor, collisions: Tensor, segments: Tensor, count: int) -> Tensor:
    """[N] weights of WPO, without gradient: how likely the policy itself would have drawn the pair.

    w(y) = exp(mean_t (log pi(y_t) - log sum_v pi(v)^2)), and a pair weighs w(chosen) w(rejected) (Zhou et
    al. 2024, arXiv 2406.11827, equation 2 with its sampled alignment; not clamped at 1, as in TRL). The
    loss of each pair is multiplied by it; the pair still counts as one. logps, collisions [K] nats,
    segments [K], count = 2N.
    """
    aligned = (logps - collisions).detach()
    tokens = segment_sums(torch.ones_like(aligned), segments, count).clamp(min=1)
    means = segment_sums(aligned, segments, count) / tokens
    return (means[0::2] + means[1::2]).exp()


def log_ratios(policy: Answers, reference: Answers, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen [N], rejected [N]) log pi(y) - log ref(y), 0 in pairs whose `weight` [N] is 0."""
    chosen, rejected, chosen_reference, rejected_reference = counted(
        weight, policy.chosen, policy.rejected, reference.chosen, reference.rejected
    )
    return chosen - chosen_reference, rejected - rejected_reference


def token_means(answers: Answers, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen [N], rejected [N]) log-probability per token, 0 in pairs whose `weight` [N] is 0."""
    chosen, rejected = counted(weight, answers.chosen, answers.rejected)
    return chosen / answers.chosen_tokens.clamp(min=1), rejected / answers.rejected_tokens.clamp(min=1)


def pair_metrics(policy: Answers, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What every preference loss reports, each [N]: implicit rewards `chosen` and `rejected`, their margin,
    how often it is positive, and the policy's summed log-probabilities, which tell whether both sink."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": policy.chosen.detach(),
        "logps/rejected": policy.rejected.detach(),
    }
