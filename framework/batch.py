"""Frozen records of what a forward pass takes and what it answers. Knows no file, no loss, no rank.

Letters: R rows, T tokens in a row, S segments (documents), K trained positions.

A micro-batch is *packed* by default: one row (R = 1) holds whole segments end to end, with
`position_ids` starting again at 0 in each and `boundaries` between them. *Padded* (R = S) holds one
segment a row, padded on the right. Everything after the model's body works on the K trained
positions only, so losses see no difference between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    `trained[k]` is the flat index (into R*T) of the position whose *next* token is trained, and
    `targets[k]` is that next token: the causal shift is done once, where batches are made.
    `units` is this batch's addend to the step's denominator, known before any forward pass.
    """

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64, from 0 in every segment
    boundaries: Tensor  # [S + 1] int32, first token of each segment in the packed row, then T
    trained: Tensor  # [K] int64, flat positions, ascending
    targets: Tensor  # [K] int64, token ids
    weights: Tensor  # [K] fp32, 0 = not counted
    segments: Tensor  # [K] int64, the segment of each trained position
    sources: Tensor  # [S] int64, the source each segment came from; -1 in a fill
    packed: bool  # True: R = 1 and `boundaries` rules; False: one segment a row
    max_length: int  # tokens in the longest segment
    units: float  # sum of `weights`

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.boundaries[-1])

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`; `sources`, which only metrics read, stays where it is."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and f.name != "sources"
        }
        return replace(self, **moved)


class Outputs(NamedTuple):
    """What a model answers: numbers per trained position, never a [tokens, vocabulary] tensor.

    A NamedTuple, so that the hooks of FSDP2 and DeepSpeed find the tensors in it.
    """

    logps: Tensor  # [K] fp32 nats, log-probability of `Batch.targets`
    entropies: Tensor | None = None  # [K] fp32 nats, only when asked for
    mean_logps: Tensor | None = None  # [K] fp32 nats, mean over the vocabulary, only when asked for
