"""A policy and its critic in one module: one engine, one step, one checkpoint for both.

They share nothing: the critic has a body of its own, from a reward model or from the policy's start.
Parameters are named as each would name them alone, after `policy.` or `critic.`. K: trained positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from framework.batch import Batch, Distribution, Outputs, Scores
from framework.errors import ModelError
from framework.models.load import Description
from framework.models.policy import NOTHING, Policy
from framework.models.scorer import Scorer
from framework.strategy.base import Build, Weights

POLICY, CRITIC = "policy.", "critic."


class ActorCritic(nn.Module):
    """`critic` scores the state that predicts each token: its score at a trained position is the value."""

    def __init__(self, policy: Policy, critic: Scorer) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self,
        batch: Batch,
        *,
        needs: frozenset[str] = NOTHING,
        adapter: bool = True,
        temperature: float = 1.0,
        actor: bool = True,
        distribution: Distribution | None = None,
    ) -> Outputs | Scores:
        """What the policy answers (see `Policy.forward`), with `values` [K] where `needs` names "values".

        Without that the critic does not run, and a backward pass gives it no gradient. `actor=False` asks
        the critic alone, for `Scores`. `adapter=False` leaves the critic's adapters on.
        """
        if not actor:
            return self.critic(batch)
        of_policy = needs if distribution is None else needs - {"values"}
        outputs = self.policy(
            batch, needs=of_policy, adapter=adapter, temperature=temperature, distribution=distribution
        )
        return outputs._replace(values=self.critic(batch).scores) if "values" in needs else outputs

    def blocks(self) -> Sequence[nn.Module]:
        """The decoder layers of both."""
        return [*self.policy.blocks(), *self.critic.blocks()]


def check(actor: Description, critic: Description) -> None:
    """Raises ModelError unless both read the same tokens."""
    if actor.tokenizer.get_vocab() != critic.tokenizer.get_vocab():
        raise ModelError(
            f"the critic {critic.path} has another vocabulary than the model {actor.path}, whose tokens it "
            "would have to read; use a reward model that was trained from a model of the same family, or "
            "begin the critic from the model itself"
        )


def builder(actor: Build, critic: Build) -> Build:
    """Makes the structure of both; each as `models.load.builder` makes it."""

    def build() -> nn.Module:
        policy, scorer = actor(), critic()
        assert isinstance(policy, Policy)
        assert isinstance(scorer, Scorer)
        return ActorCritic(policy, scorer)

    return build


def reader(actor: Weights, critic: Weights) -> Weights:
    """The weights of both, one model in memory after the other; each as `models.load.reader` reads it."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        for prefix, source in ((POLICY, actor), (CRITIC, critic)):
            for name, tensor in source():
                yield prefix + name, tensor

    return weights


def part(weights: Iterable[tuple[str, Tensor]], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Of an engine's weights those of POLICY or CRITIC, under the names they have alone.

    Goes through all of them: an engine's are gathered by every rank.
    """
    for name, tensor in weights:
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor
