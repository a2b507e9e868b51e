"""The GRPO family: answers to one prompt are compared with each other, so no critic is needed.

The members differ in how a group's scores become advantages, in how tokens are averaged (`Plan.averaging`)
and in the loss: GRPO is group_normalised + sequence + ppo; DAPO group_normalised + token + ppo with a higher
upper clip and `Plan.extra_prompts`; Dr. GRPO group_centred + constant + ppo; GSPO group_normalised +
sequence + gspo; RLOO leave_one_out + sequence + rloo; on-policy distillation teacher + token + reinforce, in
which the reference is a teacher and answers need no reward. Letters: N answers, Q answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from framework.errors import ConfigError
from framework.losses import advantages as estimators
from framework.losses.distill import sampled_advantages
from framework.losses.inputs import inputs
from framework.losses.items import Items
from framework.rollout.experience import Experience, token_rewards
from framework.stages.penalty import KlPenalty
from framework.stages.policy_objective import PolicyObjective

Estimate = Callable[[Experience, Tensor, Tensor | None], Tensor]


class Grpo:
    """A `Method` without a critic.

    `advantages` is one of `ADVANTAGES`. `penalty` lowers scores by the KL to the reference, as in RLOO and
    REINFORCE++; GRPO's own KL term is part of `loss` (`kl`).
    """

    def __init__(
        self,
        loss: Callable[..., Items],
        *,
        temperature: float,
        advantages: str = "group_normalised",
        penalty: KlPenalty | None = None,
    ) -> None:
        if advantages not in ADVANTAGES:
            raise ConfigError(
                f"stage.advantages={advantages} is unknown; type one of {', '.join(sorted(ADVANTAGES))}"
            )
        self.penalty = penalty or KlPenalty()
        compared = self.penalty.used or advantages == "teacher"
        self.needs = frozenset({"logps"} if compared else ())
        self.wants_reference = compared or "reference_logps" in inputs(loss)
        self._advantages = ADVANTAGES[advantages]
        self._objective = PolicyObjective(loss, temperature=temperature)

    def objective(self, iteration: int) -> PolicyObjective:
        """The same in every iteration."""
        return self._objective

    def estimate(self, experience: Experience) -> tuple[Experience, Mapping[str, float]]:
        """One advantage for all tokens of an answer, or one for each; moves the KL coefficient."""
        counted = experience.counted_tokens
        advantages = self._advantages(experience, experience.scores, self.penalty(experience))
        advantages = torch.where(counted, advantages, torch.zeros_like(advantages))
        return replace(experience, advantages=advantages), self.penalty.follow(experience)

    def state_dict(self) -> dict[str, Any]:
        """The KL coefficient of the next iteration."""
        return {"kl_coefficient": self.penalty.coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with that coefficient."""
        self.penalty.coefficient = float(state["kl_coefficient"])


def by_answer(estimator: Callable[..., Tensor], *, lengths: bool = False) -> Estimate:
    """[Q] the advantage of each token's answer, estimated from scores [N] less their penalties."""

    def estimate(experience: Experience, scores: Tensor, penalties: Tensor | None) -> Tensor:
        if penalties is not None:
            scores = scores.index_add(0, experience.owners, -penalties)
        more = {"lengths": experience.lengths} if lengths else {}
        return estimator(scores, experience.groups, **more)[experience.owners]

    return estimate


def by_token(baseline: Callable[[Tensor, Tensor], Tensor] | None = None) -> Estimate:
    """[Q] what is still to come at each token, whitened over all counted tokens: REINFORCE++.

    With a `baseline` the scores are first compared within their groups (the "-baseline" variant).
    """

    def estimate(experience: Experience, scores: Tensor, penalties: Tensor | None) -> Tensor:
        compared = scores if baseline is None else baseline(scores, experience.groups)
        rewards = token_rewards(compared, experience.offsets, penalties)
        to_go = estimators.returns_to_go(rewards, experience.owners)
        return estimators.whiten(to_go, experience.counted_tokens)

    return estimate


def by_teacher(experience: Experience, scores: Tensor, penalties: Tensor | None) -> Tensor:
    """[Q] how much likelier the reference finds each token than the policy did; scores do not enter."""
    assert experience.reference_logps is not None
    assert experience.old_logps is not None
    return sampled_advantages(experience.reference_logps, experience.old_logps)


ADVANTAGES: Mapping[str, Estimate] = {
    **{name: by_answer(estimator) for name, estimator in estimators.ESTIMATORS.items()},
    "length_weighted": by_answer(estimators.length_weighted, lengths=True),
    "teacher": by_teacher,
    "reinforce_plus_plus": by_token(),
    "reinforce_plus_plus_baseline": by_token(estimators.group_centred),
}
"""Name -> (experience, scores [N] with NaN where there is none, penalties [Q]) -> advantages [Q]."""
