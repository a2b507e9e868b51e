"""What keeps a policy near its reference from inside the reward: a KL penalty per token, and its control.

Letters: N answers, Q answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from framework.errors import ConfigError
from framework.losses.kl import Estimator, adaptive_kl, k1, kl
from framework.rollout.experience import Experience


@dataclass
class KlPenalty:
    """Lowers each token's reward by `coefficient` times an estimate of its KL to the reference, in nats.

    With `target` (nats per answer) the coefficient follows the KL of each iteration, see
    `losses.kl.adaptive_kl`; without, it stays. Raises ConfigError for a pair of settings without effect.
    """

    coefficient: float = 0.0
    estimator: Estimator = "k1"
    target: float | None = None  # nats per answer
    horizon: float = 10_000.0  # answers over which the coefficient may change by a fifth

    def __post_init__(self) -> None:
        if self.target is not None and self.coefficient <= 0:
            raise ConfigError(
                f"stage.kl_coefficient={self.coefficient} with stage.kl_target={self.target}: an adaptive "
                "coefficient is multiplied and never leaves 0; type stage.kl_coefficient=0.05"
            )

    @property
    def used(self) -> bool:
        """Whether a reference is needed for it."""
        return self.coefficient > 0

    def __call__(self, experience: Experience) -> Tensor | None:
        """[Q] what each token's reward is lowered by; None where nothing is."""
        if not self.used:
            return None
        assert experience.old_logps is not None
        assert experience.reference_logps is not None
        return self.coefficient * kl(experience.old_logps, experience.reference_logps, self.estimator)

    def follow(self, experience: Experience) -> dict[str, float]:
        """Set the coefficient of the next iteration; metrics of this one."""
        if not self.used or not experience.counted.any():
            return {}
        assert experience.old_logps is not None
        assert experience.reference_logps is not None
        nats = k1(experience.old_logps, experience.reference_logps)
        by_answer = torch.zeros(len(experience.counted), dtype=nats.dtype)
        by_answer = by_answer.index_add(0, experience.owners, nats)[experience.counted]
        metrics = {"kl_coefficient": self.coefficient, "kl_per_answer": float(by_answer.mean())}
        if self.target is not None:
            self.coefficient = adaptive_kl(
                self.coefficient,
                metrics["kl_per_answer"],
                target=self.target,
                horizon=self.horizon,
                samples=float(len(by_answer)),
            )
        return metrics
