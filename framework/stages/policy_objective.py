"""One forward pass over generated answers, then a policy-gradient loss and, with a critic, a value loss.

Letters: K trained positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from framework.batch import Outputs, RolloutBatch
from framework.losses.inputs import inputs
from framework.losses.items import Items
from framework.strategy.base import Engine, World

GIVEN = (
    "weight",
    "segments",
    "old_logps",
    "advantages",
    "correction",
    "reference_logps",
    "old_values",
    "returns",
)
"""What comes with the batch, and"""
COMPUTED = frozenset({"entropies", "mean_logps", "collisions", "values"}) & frozenset(Outputs._fields)
"""what the model computes on request; log-probabilities always."""
OFFERED = (*GIVEN, "logps", *sorted(COMPUTED))


class PolicyObjective:
    """`loss` and `value_loss` are pure functions that ask for what they need by parameter name.

    On offer, [K] each: logps, old_logps, advantages, weight, segments, and where the stage has them
    reference_logps, correction, old_values, returns; and what the model computes on request, entropies and
    values. A token costs loss + `value_scale` * value_loss; with `critic_only` the second alone, and then
    only the critic runs and gets a gradient. A batch without old_logps is of answers that these very weights
    gave: they are its logps, without gradient, and `heard` keeps what the model said of it.
    """

    def __init__(
        self,
        loss: Callable[..., Items],
        *,
        temperature: float,
        value_loss: Callable[..., Items] | None = None,
        value_scale: float = 1.0,
        critic_only: bool = False,
    ) -> None:
        self.loss, self.value_loss = loss, value_loss
        self.temperature = temperature
        self.value_scale, self.critic_only = value_scale, critic_only
        wanted = inputs(loss) | (inputs(value_loss) if value_loss is not None else frozenset())
        self.needs = wanted & COMPUTED
        self.forget()

    def __call__(self, engine: Engine, batch: RolloutBatch) -> Items:
        asked, batch = id(batch), batch.to(engine.world.device)
        given: dict[str, Tensor | None] = {
            "weight": batch.weights,
            "segments": batch.segments,
            "old_logps": batch.old_logps,
            "advantages": batch.advantages,
            "correction": batch.correction,
            "reference_logps": batch.reference_logps,
            "old_values": batch.old_values,
            "returns": batch.returns,
        }
        if self.critic_only:
            assert self.value_loss is not None
            value = _call(self.value_loss, given | {"values": engine(batch, actor=False).scores})
            metrics = {**value.metrics, "value/loss": value.loss.detach()}
            return Items(self.value_scale * value.loss, value.weight, metrics)
        first = batch.old_logps is None
        needs = self.needs | {"entropies"} if first else self.needs
        outputs = engine(batch, needs=needs, temperature=self.temperature)
        given |= {name: getattr(outputs, name) for name in ("logps", *self.needs)}
        if first:
            given["old_logps"] = outputs.logps.detach()
            self.heard[asked] = {name: getattr(outputs, name).detach() for name in ("logps", "entropies")}
        else:
            self._watch(outputs.logps.detach() - batch.old_logps, batch.weights > 0)
        policy = _call(self.loss, given)
        if self.value_loss is None:
            return policy
        value = _call(self.value_loss, given)
        both = {**policy.metrics, **value.metrics}
        both |= {"policy/loss": policy.loss.detach(), "value/loss": value.loss.detach()}
        return Items(policy.loss + self.value_scale * value.loss, policy.weight, both)

    def forget(self) -> None:
        """Start to measure the distance anew, and to hear."""
        self.heard: dict[int, dict[str, Tensor]] = {}  # id of a batch -> logps and entropies, [K] each
        self._distance = torch.zeros(2, dtype=torch.float64)  # sum over tokens, tokens

    def distance(self, world: World) -> float:
        """Mean k3 estimate, in nats per counted token, of the KL between the policy that made the answers
        and the one of the last step's forward passes. Collective; starts anew."""
        total, tokens = self._distance.tolist()
        self._distance = torch.zeros_like(self._distance)
        total, tokens = world.sum([total, tokens])
        return total / tokens if tokens else 0.0

    def _watch(self, log_ratio: Tensor, counted: Tensor) -> None:
        """Add up exp(l) - 1 - l, l = log new - log old, over counted tokens, on the device."""
        log_ratio = log_ratio.double()
        k3 = torch.where(counted, log_ratio.exp() - 1 - log_ratio, 0.0)
        self._distance = self._distance.to(k3.device) + torch.stack([k3.sum(), counted.sum().double()])


def _call(loss: Callable[..., Items], given: Mapping[str, Tensor | None]) -> Items:
    return loss(**{name: given[name] for name in inputs(loss) if given.get(name) is not None})
