"""Numbers per answer token, computed by whichever rank held the answer and known to all.

Every rank adds zeros where another one computed, so the sum over ranks is exact. Letters: Q answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from framework.batch import Batch
from framework.rollout.experience import Experience, Packing, cut
from framework.strategy.base import World

AT_ONCE = 1 << 20  # numbers in one exchange, so that a long iteration does not double in memory


def over_tokens(
    world: World,
    experience: Experience,
    packing: Packing,
    answer: Callable[[Batch], Mapping[str, Tensor]],
    chosen: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """[Q] fp64 of each name that `answer` gives as [K] for a micro-batch, on every rank. Collective.

    Micro-batches are those of all sequences in the order of `chosen`; None: their own.
    """
    mine: dict[str, Tensor] = {}
    order = range(len(experience.completions)) if chosen is None else chosen
    for batch, tokens in cut(experience, order, packing):
        for name, values in answer(batch).items():
            whole = mine.setdefault(name, torch.zeros(int(experience.offsets[-1]), dtype=torch.float64))
            if tokens.numel():
                whole[tokens] = values.detach().double().cpu()
    return {name: everywhere(world, values) for name, values in mine.items()}


def everywhere(world: World, mine: Tensor) -> Tensor:
    """The sum over ranks of a flat fp64 tensor. Collective."""
    if world.size == 1:
        return mine
    parts = [torch.tensor(world.sum(part.tolist()), dtype=torch.float64) for part in mine.split(AT_ONCE)]
    return torch.cat(parts)
