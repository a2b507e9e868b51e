"""Examples to the tensors of one micro-batch. The causal shift is done here, once.

Letters as in `framework.batch`: R rows, T tokens in a row, S segments, K trained positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from framework.batch import Batch
from framework.data.shared import int64
from framework.data.tables import Table

Where = Sequence[tuple[int, int]]
"""The examples of one optimizer step over all ranks, in order: (table, row)."""


class Extent(NamedTuple):
    """What one example takes of a micro-batch."""

    tokens: int  # real tokens
    longest: int  # tokens of its longest row when padded
    rows: int  # its rows when padded


class Kind(Protocol):
    """What examples of a kind of table take, count and become."""

    def extent(self, tables: Any, where: Where, at: int, *, packing: bool) -> Extent:
        """What example `at` of a step takes."""

    def facts(self, tables: Any, source: int, row: int) -> Mapping[str, float]:
        """Numbers that are added up over a step and per source; among them `trained_tokens`."""

    def collate(
        self, tables: Any, where: Where, chosen: Sequence[int], *, packing: bool, pad_id: int
    ) -> Batch:
        """A micro-batch of the examples `chosen` of a step; of none, the smallest that counts nothing."""


class Supervised:
    """Examples of `tables.Table`: one segment each, some of its tokens trained."""

    def extent(self, tables: Sequence[Table], where: Where, at: int, *, packing: bool) -> Extent:
        """What example `at` of a step takes."""
        source, row = where[at]
        length = int(tables[source].lengths[row])
        return Extent(length, length, 1)

    def facts(self, tables: Sequence[Table], source: int, row: int) -> Mapping[str, float]:
        """Nothing but the trained tokens."""
        return {"trained_tokens": float(tables[source].trained[row])}

    def collate(
        self, tables: Sequence[Table], where: Where, chosen: Sequence[int], *, packing: bool, pad_id: int
    ) -> Batch:
        """The examples `chosen` of a step; none give a fill."""
        if not chosen:
            return fill(packing=packing, pad_id=pad_id)
        taken = [where[i] for i in chosen]
        return collate(
            [tables[source].example(row) for source, row in taken],
            [source for source, _ in taken],
            packing=packing,
            pad_id=pad_id,
        )


Example = tuple[np.ndarray, np.ndarray]
"""(input_ids [T], trained [T] bool), as `tables.Table.example` gives them."""


def collate(examples: Sequence[Example], sources: Sequence[int], *, packing: bool, pad_id: int) -> Batch:
    """One micro-batch of S examples, packed end to end or padded on the right to the longest.

    `sources` is [S], the table each came from. A token marked as trained is the target of the position
    before it in its own segment; the first token of a segment is nobody's target.
    """
    lengths = np.array([len(ids) for ids, _ in examples], dtype=np.int64)
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    longest = int(lengths.max())
    if packing:
        rows = np.concatenate([ids for ids, _ in examples])[None]
        positions = np.concatenate([np.arange(n) for n in lengths])[None]
        begins = boundaries[:-1]
    else:
        rows = np.full((len(examples), longest), pad_id)
        for row, (ids, _) in zip(rows, examples, strict=True):
            row[: len(ids)] = ids
        positions = np.broadcast_to(np.arange(longest), rows.shape).copy()
        begins = np.arange(len(examples)) * longest
    learnt = [np.flatnonzero(trained[1:]) for _, trained in examples]  # positions before trained tokens
    trained = np.concatenate([begin + at for begin, at in zip(begins, learnt, strict=True)])
    targets = np.concatenate([ids[1:][at] for (ids, _), at in zip(examples, learnt, strict=True)])
    return Batch(
        input_ids=int64(rows),
        position_ids=int64(positions),
        boundaries=torch.from_numpy(boundaries.astype(np.int32)),
        trained=int64(trained),
        targets=int64(targets),
        weights=torch.ones(len(trained)),
        segments=int64(np.repeat(np.arange(len(examples)), [len(at) for at in learnt])),
        sources=torch.tensor(sources, dtype=torch.int64),
        packed=packing,
        max_length=longest,
        units=float(len(trained)),
    )


def fill(*, packing: bool, pad_id: int) -> Batch:
    """The smallest batch that runs the whole model and counts nothing: two tokens, one of weight 0.

    For ranks that have fewer micro-batches than others; it has a trained position so that every part of
    the model, and every collective in it, runs.
    """
    return Batch(
        input_ids=torch.full((1, 2), pad_id),
        position_ids=torch.tensor([[0, 1]]),
        boundaries=torch.tensor([0, 2], dtype=torch.int32),
        trained=torch.tensor([0]),
        targets=torch.tensor([pad_id]),
        weights=torch.zeros(1),
        segments=torch.tensor([0]),
        sources=torch.tensor([-1]),
        packed=packing,
        max_length=2,
        units=0.0,
    )
