"""What is written down about a rollout: how good, how long, how far from where it began, how exact.

Functions of an `Experience` alone, which is alike on all ranks. Letters: N answers, Q answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from framework.rollout.experience import Experience


def of_rollout(experience: Experience) -> dict[str, float]:
    """Rewards, lengths, entropy, distance to the reference, difference between sampler and trainer.

    `reward` is the mean of what the reward gave, answers it failed on left out, and `reward_std` its
    deviation over answers. `kl` is the mean of log pi - log ref per token (k1: unbiased, may be negative),
    `kl_k3` the mean of its low-variance estimate, which is never negative; nats per token.
    """
    rewards = experience.rewards[~experience.rewards.isnan()]
    lengths = experience.lengths.double()
    metrics = {
        "reward_failed_share": float(experience.rewards.isnan().double().mean()),
        "finished_share": float(experience.finished.double().mean()),
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "sequences": float(len(lengths)),
        "tokens": float(lengths.sum()),
    }
    if rewards.numel():
        metrics |= {"reward": float(rewards.mean()), "reward_std": float(rewards.std(correction=0))}
    tokens = experience.counted_tokens
    if not tokens.any():
        return metrics
    if experience.entropies is not None:
        metrics["entropy"] = float(experience.entropies[tokens].mean())
    if experience.old_logps is not None and experience.reference_logps is not None:
        log_ratio = (experience.old_logps - experience.reference_logps)[tokens]
        metrics |= {"kl": float(log_ratio.mean()), "kl_k3": float(_k3(log_ratio).mean())}
    if experience.old_logps is not None and experience.sampler_logps is not None:
        metrics |= mismatch((experience.old_logps - experience.sampler_logps)[tokens])
    return metrics


def mismatch(log_ratio: Tensor) -> dict[str, float]:
    """How far trainer and sampler are apart on the drawn tokens, from log trainer - log sampler [n] nats.

    mean and max of its size; the KL from sampler to trainer (k3); the effective sample size as a share of
    n, (sum w)^2 / (n sum w^2) with w the ratio: 1 where both agree.
    """
    size, ratio = log_ratio.abs(), log_ratio.exp()
    return {
        "mismatch/mean": float(size.mean()),
        "mismatch/max": float(size.max()),
        "mismatch/kl": float((ratio - 1 - log_ratio).mean()),
        "mismatch/ess": float(ratio.sum().square() / (ratio.square().sum() * len(ratio))),
    }


def of_advantages(experience: Experience) -> dict[str, float]:
    """Score after shaping, moments of the advantages over counted tokens, how many answers count."""
    metrics = {"counted_share": float(experience.counted.double().mean())}
    tokens = experience.counted_tokens
    if not tokens.any() or experience.advantages is None:
        return metrics
    advantages = experience.advantages[tokens]
    return metrics | {
        "score": float(experience.scores[experience.counted].mean()),
        "advantage": float(advantages.mean()),
        "advantage_std": float(advantages.std(correction=0)),
    }


def rows(
    experience: Experience, count: int, decode: Callable[[Sequence[int]], str] | None
) -> list[dict[str, Any]]:
    """The first answers as rows for people: prompt, answer, reward, length, whether it ended."""
    shown = []
    for prompt, completion, reward in zip(
        experience.prompts[:count], experience.completions, experience.rewards.tolist(), strict=False
    ):
        row: dict[str, Any] = {} if decode is None else {"prompt": decode(prompt.ids)}
        shown.append(
            row
            | {
                "answer": completion.text,
                "reward": reward if reward == reward else None,  # JSON has no NaN
                "tokens": len(completion.ids),
                "finished": completion.finished,
            }
        )
    return shown


def _k3(log_ratio: Tensor) -> Tensor:
    """exp(-l) - 1 + l for l = log pi - log ref on tokens drawn from pi (Schulman 2020)."""
    return (-log_ratio).exp() - 1 + log_ratio
