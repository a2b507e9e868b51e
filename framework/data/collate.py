"""Examples to the tensors of one micro-batch. The causal shift is done here, once.

Letters as in `framework.batch`: R rows, T tokens in a row, S segments, K trained positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from framework.batch import Batch

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
        input_ids=_tensor(rows),
        position_ids=_tensor(positions),
        boundaries=torch.from_numpy(boundaries.astype(np.int32)),
        trained=_tensor(trained),
        targets=_tensor(targets),
        weights=torch.ones(len(trained)),
        segments=_tensor(np.repeat(np.arange(len(examples)), [len(at) for at in learnt])),
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


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
