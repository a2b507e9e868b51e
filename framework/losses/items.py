"""The one contract between a loss and the trainer: losses of countable units and their weights.

A loss returns `Items` and never a mean. The trainer divides the weighted sum by the number of units
of the whole optimizer step over all ranks and micro-batches, so the result cannot depend on how the
step was cut. N is the number of units in one micro-batch (tokens, pairs or sequences).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Items:
    """Losses of N units.

    A metric is reported as the mean over the units where it is not NaN, weighted by `weight`.
    """

    loss: Tensor  # [N] fp32
    weight: Tensor  # [N] fp32, 0 = not counted
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # each [N]; NaN = does not apply

    def total(self) -> Tensor:
        """Weighted sum, a scalar connected to the graph even when nothing counts.

        Units of weight 0 are selected away, not multiplied: an infinite loss of a masked unit
        must not become 0 * inf = NaN.
        """
        counted = self.weight > 0
        return torch.where(counted, self.loss * self.weight, torch.zeros_like(self.loss)).sum()


Objective = Callable[[Any, Any], Items]
"""(engine, batch) -> Items: a forward through the engine, then a pure loss."""
