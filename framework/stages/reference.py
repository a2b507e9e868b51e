"""The reference of a preference loss: the start model's log-probabilities of the same answers.

Three ways to have it, alike in their numbers: the policy with its adapter off (costs a pass, no memory), a
frozen copy (a pass and a second model), or columns computed once and kept on disk (neither, from the second
run on). Letters: K trained positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from framework.batch import Batch
from framework.stages import columns, segments
from framework.stages.coupling import policy_logps
from framework.strategy.base import Engine, Frozen, World


class Reference(Protocol):
    """Answers for the start model."""

    def __call__(self, batches: Sequence[Batch]) -> list[Tensor]:
        """[K] fp32 nats of each batch's `targets`, without gradients or dropout.

        Collective: every rank hands over as many batches.
        """


class AdapterOff:
    """The policy itself with its LoRA adapter off, which is the model that training began with."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, batches: Sequence[Batch]) -> list[Tensor]:
        return policy_logps(self.engine, batches, adapter=False)


class FrozenCopy:
    """A second model that is never trained, spread over the ranks like the first."""

    def __init__(self, frozen: Frozen) -> None:
        self.frozen = frozen

    def __call__(self, batches: Sequence[Batch]) -> list[Tensor]:
        return [self.frozen(batch).logps for batch in batches]


class Cached:
    """Columns on disk, one number per trained token, found again by what a segment says.

    A segment's key is a hash of its tokens and of which of them are trained, so the order of the data,
    the cut into micro-batches and the number of ranks do not matter.
    """

    def __init__(self, found: columns.Columns, device: torch.device | str = "cpu") -> None:
        self.columns = found
        self.device = device

    def __call__(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Raises CheckpointError for a segment that was not there when the columns were computed."""
        return [self._look_up(batch) for batch in batches]

    def _look_up(self, batch: Batch) -> Tensor:
        values = torch.zeros(len(batch.trained))
        if bool((batch.sources >= 0).all()):  # else a fill, which is no row of the data
            found = [self.columns.find(key) for key in columns.keys(batch)]
            values[segments.order(batch).cpu()] = torch.from_numpy(np.concatenate(found))
        return values.to(self.device)


def cached(
    root: Path,
    identity: Mapping[str, Any],
    micros: Iterable[Batch],
    *,
    ask: Reference,
    world: World,
) -> Cached:
    """The columns under `root` that belong to `identity`; computed by `ask` over `micros` where absent.

    `identity` is everything that decides the numbers: fingerprints of model and data, precision,
    attention. `micros` hold every row of the tables once over all ranks, as many on each rank, and are
    walked through only when there is something to compute. `ask` is the start model, for which
    `partial(policy_logps, engine)` will do before a checkpoint is loaded into the engine: no second model.

    Collective. `root` must be a directory that all hosts share. Columns that are damaged are computed
    again. Raises CheckpointError when they cannot be written or the ranks do not see each other's.
    """
    directory = Path(root).expanduser() / columns.fingerprint(identity)
    if not columns.whole(directory, world=world):
        columns.write(directory, _answers(ask, micros), world=world)
    return Cached(columns.Columns(directory), world.device)


def _answers(ask: Reference, micros: Iterable[Batch]) -> Iterable[tuple[Batch, Tensor]]:
    for batch in micros:
        (logps,) = ask([batch])
        yield batch, logps
