"""Proximal policy optimisation: one model with an actor and a critic, one forward pass, one objective.

The reward of a token is minus its KL penalty, plus the answer's score at the last one; generalised
advantages come from the critic's values before the first update. Letters: N answers, Q answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from framework.losses.advantages import gae, whiten
from framework.losses.inputs import inputs
from framework.losses.items import Items
from framework.rollout.experience import Experience, token_rewards
from framework.stages.penalty import KlPenalty
from framework.stages.policy_objective import PolicyObjective


@dataclass(frozen=True, kw_only=True)
class Estimation:
    """How advantages come from rewards and values."""

    gamma: float = 1.0  # discount per token, (0, 1]
    gae_lambda: float = 0.95  # 1: returns alone, 0: one step ahead; the bias and spread of an advantage
    whiten_rewards: bool = False  # token rewards divided by their deviation, their mean kept
    whiten_advantages: bool = True  # to mean 0 and deviation 1 over all counted tokens of the iteration


class Ppo:
    """A `Method` for an engine whose model answers "values" beside log-probabilities.

    `loss` is a policy-gradient loss and `value_loss` one of values; a token costs loss + `value_scale` *
    value_loss. In the first `critic_warmup` iterations the critic alone is trained: the actor's gradient is
    zero (weight decay, if any, still acts).
    """

    needs = frozenset({"logps", "values"})

    def __init__(
        self,
        loss: Callable[..., Items],
        value_loss: Callable[..., Items],
        *,
        temperature: float,
        penalty: KlPenalty,
        estimation: Estimation,
        value_scale: float = 0.1,
        critic_warmup: int = 0,
    ) -> None:
        self.penalty, self.estimation = penalty, estimation
        self.critic_warmup = critic_warmup
        self.wants_reference = penalty.used or "reference_logps" in inputs(loss)
        settings: dict[str, Any] = {"temperature": temperature, "value_loss": value_loss}
        self._both = PolicyObjective(loss, value_scale=value_scale, **settings)
        self._critic = PolicyObjective(loss, value_scale=value_scale, critic_only=True, **settings)

    def objective(self, iteration: int) -> PolicyObjective:
        """The critic's alone while it warms up, then both."""
        return self._critic if iteration < self.critic_warmup else self._both

    def estimate(self, experience: Experience) -> tuple[Experience, Mapping[str, float]]:
        """Advantages and returns; moves the KL coefficient."""
        values, chosen = experience.old_values, self.estimation
        assert values is not None
        counted = experience.counted_tokens
        rewards = token_rewards(experience.scores, experience.offsets, self.penalty(experience))
        if chosen.whiten_rewards:
            rewards = whiten(rewards, counted, keep_mean=True)
        advantages, returns = gae(
            rewards, values, experience.owners, gamma=chosen.gamma, lambda_=chosen.gae_lambda
        )
        metrics = {**self.penalty.follow(experience), **_of_values(values[counted], returns[counted])}
        if chosen.whiten_advantages:
            advantages = whiten(advantages, counted)
        zero = torch.zeros((), dtype=advantages.dtype)
        return (
            replace(
                experience,
                advantages=torch.where(counted, advantages, zero),
                returns=torch.where(counted, returns, zero),
            ),
            metrics,
        )

    def state_dict(self) -> dict[str, Any]:
        """The KL coefficient of the next iteration."""
        return {"kl_coefficient": self.penalty.coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with that coefficient."""
        self.penalty.coefficient = float(state["kl_coefficient"])


def _of_values(values: Tensor, returns: Tensor) -> dict[str, float]:
    """How well the critic foresaw what came: explained variance 1 is perfect, 0 no better than the mean."""
    if len(values) < 2:
        return {}
    spread = float(returns.var())
    explained = 1 - float((returns - values).var()) / spread if spread > 0 else float("nan")
    return {
        "value": float(values.mean()),
        "return": float(returns.mean()),
        **({"value/explained_variance": explained} if spread > 0 else {}),
    }
