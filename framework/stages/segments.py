"""From numbers per trained token to numbers per segment. Letters: K trained positions, S segments.

The trained positions of a segment are in the order of its tokens, but segments may interleave: two answers
to a shared prompt begin at the same position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.batch import Batch
from framework.losses.answers import segment_sums


def count(batch: Batch) -> int:
    """S."""
    return batch.boundaries.numel() - 1


def sums(values: Tensor, batch: Batch) -> Tensor:
    """[S], the sum of `values` [K] over each segment. 0 where nothing is trained."""
    return segment_sums(values, batch.segments, count(batch))


def tokens(batch: Batch) -> Tensor:
    """[S] int64, trained positions of each segment."""
    return torch.bincount(batch.segments, minlength=count(batch))


def order(batch: Batch) -> Tensor:
    """[K] int64, the trained positions sorted by segment, within one in the order of its tokens."""
    return torch.argsort(batch.segments, stable=True)
