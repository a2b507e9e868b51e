"""Supervised fine-tuning: the loader's micro-batches, a token loss, one term.

Replay needs nothing here: replayed rows come from the mixture in the same micro-batches and share
the one global token mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from framework.batch import Batch
from framework.losses.inputs import inputs
from framework.losses.items import Items, Objective
from framework.stages.base import Term

COMPUTED = ("entropies", "mean_logps")
"""What a token loss may ask for by parameter name beside `logps` and `weight`; the model computes it."""


class Micros(Protocol):
    """What a loader hands over for one optimizer step."""

    @property
    def micros(self) -> Sequence[Batch]: ...

    @property
    def stats(self) -> Mapping[str, float]: ...


class Loader(Protocol):
    """Random access to optimizer steps; its state is {"index": examples consumed} and changes of replay."""

    def next(self, rewrite: Any = None) -> Micros: ...

    def change_share(self, share: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class TokenObjective:
    """A forward pass, then a loss per trained token.

    `loss` is a pure function that asks for what it needs by parameter name: `logps` [K], `weight`
    [K], or any of `COMPUTED`. With more than one name in `sources`, "loss/<name>" is reported beside the mean
    over all.
    """

    in_nats = True

    def __init__(self, loss: Callable[..., Items], sources: Sequence[str] = ()) -> None:
        self.loss = loss
        self.sources = sources
        self.needs = inputs(loss) & frozenset(COMPUTED)

    def __call__(self, engine: Any, batch: Batch) -> Items:
        batch = batch.to(engine.world.device)
        outputs = engine(batch, needs=self.needs)
        given = {"logps": outputs.logps, "weight": batch.weights}
        given |= {name: getattr(outputs, name) for name in self.needs}
        return by_source(self.loss(**given), batch, self.sources)


def by_source(items: Items, batch: Batch, sources: Sequence[str]) -> Items:
    """The same items; with more than one name in `sources`, "loss/<name>" is reported, too."""
    if len(sources) < 2:
        return items
    source = batch.sources.to(batch.segments.device)[batch.segments]  # [K]
    nats = items.loss.detach()
    absent = torch.full_like(nats, torch.nan)
    apart = {f"loss/{name}": torch.where(source == i, nats, absent) for i, name in enumerate(sources)}
    return Items(items.loss, items.weight, {**items.metrics, **apart})


class Supervised:
    """A `Stage` over one loader, with held-out sets of fixed micro-batches."""

    def __init__(
        self,
        loader: Loader,
        objective: Objective,
        held_out: Mapping[str, Sequence[Batch]],
        held_out_objective: Objective,
    ) -> None:
        self.loader = loader
        self.objective = objective
        self._held_out = {name: Term(held_out_objective, micros) for name, micros in held_out.items()}

    def next(self, step: int) -> Sequence[Term]:
        """The one term of this step."""
        taken = self.loader.next()
        return [Term(self.objective, taken.micros, stats=taken.stats)]

    resting = True

    def reports(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Nothing happens here besides training."""
        return []

    def held_out(self) -> Mapping[str, Term]:
        """The held-out sets, by name."""
        return self._held_out

    def steer(self, share: float) -> None:
        """From the next step on replay has `share` of the trained tokens."""
        self.loader.change_share(share)

    def state_dict(self) -> dict[str, Any]:
        """The data position: one integer, and replay's shares where they were changed."""
        return dict(self.loader.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from that position."""
        self.loader.load_state_dict(state)
