"""The critic's loss. Letters: K trained positions, each the state that predicts a generated token."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.losses.guard import counted, require
from framework.losses.items import Items


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weight: Tensor, *, clip: float | None
) -> Items:
    """max((V - R)^2, (V_old + clip(V - V_old, -e, e) - R)^2) / 2, e = `clip`.

    Schulman et al. 2017 as coded by its authors: a value may move by e per iteration without being charged
    less for it. e > 0 in units of the return, 0.2 as a rule; None is the squared error / 2. The coefficient
    is the stage's. values, old_values, returns, weight [K]; fp32. Raises ValueError for e outside its range.
    """
    values, old_values, returns = counted(weight, values, old_values, returns)
    squared = (values - returns).square()
    metrics = {"value/error": (values - returns).detach().abs(), "value/mean": values.detach()}
    if clip is None:
        return Items(0.5 * squared, weight, metrics)
    require("clip", clip, above=0)
    near = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    metrics["value/clipped"] = (near > squared).detach().to(values.dtype)
    return Items(0.5 * torch.maximum(squared, near), weight, metrics)
