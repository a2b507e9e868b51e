"""What couples the units of one step: computed over the whole world before the step, without gradients.

A loss is additive over its units, so whatever one unit must know of the others (the mean over the step, its
rank among all) is a plain number by the time the loss is called. Letters: N pairs, n numbers of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from framework.batch import Batch
from framework.strategy.base import Engine, World


def policy_logps(engine: Engine, batches: Sequence[Batch], **options: Any) -> list[Tensor]:
    """[K] fp32 nats of each batch's `targets`, without gradients or dropout; `options` go to the model.

    Collective: every rank hands over as many batches.
    """
    with engine.inference():
        return [engine(batch, **options).logps for batch in batches]


def same_rank(world: World, ours: Tensor, theirs: Tensor) -> Tensor:
    """[n]: for each of `ours` [n], the one of `theirs` [n] that has its rank among those of all ranks.

    With all n_1 + ... + n_W numbers of either kind sorted, the k-th of `ours` is matched with the k-th of
    `theirs`: the optimal transport between the two in one dimension. Collective.
    """
    ranks = world.gather([ours.tolist(), theirs.tolist()])
    everything = torch.tensor([number for mine, _ in ranks for number in mine], dtype=torch.float64)
    others = torch.tensor([number for _, mine in ranks for number in mine], dtype=torch.float64).sort().values
    matched = torch.empty_like(others)
    matched[everything.argsort(stable=True)] = others
    first = sum(len(mine) for mine, _ in ranks[: world.rank])
    return matched[first : first + len(ours)].to(theirs)


B = TypeVar("B", bound=Batch)


class Coupled(Sequence[B], Generic[B]):
    """Held-out micro-batches that are coupled anew, with the weights of the day, whenever they are walked.

    `couple` gives this rank's `count` micro-batches; it is collective, so all ranks must walk together.
    """

    def __init__(self, count: int, couple: Callable[[], Sequence[B]]) -> None:
        self._count = count
        self._couple = couple

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._couple()[index]

    def __iter__(self) -> Iterator[B]:
        return iter(self._couple())
