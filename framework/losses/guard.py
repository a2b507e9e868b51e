"""What losses do first: refuse settings outside their range, and leave out what does not count.

Knows no particular loss. Letters: N units.
"""

from __future__ import annotations

import torch
from torch import Tensor


def require(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise ValueError unless `value` lies in the interval that the bounds describe.

    `least` and `most` belong to it, `above` and `below` do not. NaN lies in no interval.
    """
    inside = (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
        and value == value
    )
    if not inside:
        low = f"[{least}" if least is not None else f"({'-inf' if above is None else above}"
        high = f"{most}]" if most is not None else f"{'inf' if below is None else below})"
        raise ValueError(f"{name}={value} is outside {low}, {high}")


def counted(weight: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Each of `values` [N] where `weight` [N] is positive, and 0 elsewhere.

    `Items.total` keeps the loss of a masked unit out of the sum. Its gradient needs this as well: a zero
    times the slope at an infinite or missing number is NaN, unless the number never entered.
    """
    counts = weight > 0
    return tuple(torch.where(counts, value, torch.zeros_like(value)) for value in values)


def choose(condition: Tensor, yes: float, no: float, dtype: torch.dtype) -> Tensor:
    """[N] `yes` where `condition` [N] holds and `no` elsewhere, rounded once, to `dtype`.

    `torch.where` of two plain numbers rounds to the default type first, which costs fp64 its digits.
    """
    one, other = (torch.full((), number, dtype=dtype, device=condition.device) for number in (yes, no))
    return torch.where(condition, one, other)
