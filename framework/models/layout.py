"""Where attention's rows lie in a packed micro-batch: planned once, read by every layer.

Knows batches and indices, no kernel. Letters: T tokens, S segments, P places (see `framework.batch`), Q
places of attention's rows with their padding, L of the longest segment of a group.

Attention works on rectangles of segments of similar length, or on segments end to end. Tokens are copied
into them and the outputs come back, one for each token. Where segments begin alike a token has several
copies: they see the same keys, so the first one's output is everyone's; its gradient is the sum over all.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from framework.batch import Batch

# Segments of one group are padded to the longest: at most a quarter of the work on it is thrown away.
GROUP_FILL = 0.75


@dataclass(frozen=True)
class Group:
    """Segments of similar length, right-padded to one rectangle."""

    rows: int
    length: int  # L


@dataclass(frozen=True)
class Segments:
    """Where the segments of one micro-batch lie."""

    packed: bool
    boundaries: Tensor  # [S + 1] int32, of the segments that are computed
    max_length: int
    groups: tuple[Group, ...] = ()
    gather: Tensor | None = None  # [Q] token that each place of attention's rows comes from; None: in order
    inverse: Tensor | None = None  # [T] place of each token, the first one where it has several
    copies: tuple[tuple[Tensor, Tensor], ...] = ()  # (tokens, places) of second, third, ... copies


def plan(batch: Batch, *, grouped: bool = True) -> Segments:
    """The plan of one micro-batch. `grouped=False`: for kernels that take segments end to end.

    Segments of the same tokens (an answer in several pairs of a ranking) are computed once.
    """
    if not batch.packed or (batch.places is None and not grouped):
        return Segments(batch.packed, batch.boundaries, batch.max_length)
    boundaries = batch.boundaries.tolist()
    device = batch.input_ids.device
    places = None if batch.places is None else batch.places.cpu().numpy()
    spans = _distinct(list(itertools.pairwise(boundaries)), places)
    groups: list[Group] = []
    gather: list[np.ndarray] = []  # places, then tokens
    real: list[np.ndarray] = []  # which of them are no padding
    for rows in _rectangles(spans) if grouped else [[span] for span in spans]:
        length = rows[0][1] - rows[0][0]
        groups.append(Group(len(rows), length))
        for start, stop in rows:
            # padding repeats the segment's last token: finite, and seen by none
            gather.append(np.minimum(np.arange(start, start + length), stop - 1))
            real.append(np.arange(start, start + length) < stop)
    order, kept = np.concatenate(gather), np.flatnonzero(np.concatenate(real))
    if places is not None:
        order = places[order]
    ends = np.cumsum([0, *(stop - start for start, stop in spans)], dtype=np.int32)
    facts: dict[str, Any] = {
        "packed": True,
        "boundaries": batch.boundaries if grouped else torch.from_numpy(ends).to(device),
        "max_length": batch.max_length,
        "groups": tuple(groups) if grouped else (),
    }
    if len(order) == batch.input_ids.numel() and np.array_equal(order, np.arange(len(order))):
        return Segments(**facts)
    inverse, *copies = _occurrences(order, kept)
    return Segments(
        **facts,
        gather=torch.from_numpy(order).to(device),
        inverse=torch.from_numpy(inverse[1]).to(device),
        copies=tuple((torch.from_numpy(t).to(device), torch.from_numpy(p).to(device)) for t, p in copies),
    )


def _distinct(spans: list[tuple[int, int]], places: np.ndarray | None) -> list[tuple[int, int]]:
    """Each sequence of tokens once, where it comes first."""
    if places is None:
        return spans
    first: dict[bytes, tuple[int, int]] = {}
    for start, stop in spans:
        first.setdefault(places[start:stop].tobytes(), (start, stop))
    return list(first.values())


def _rectangles(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Segments by length, longest first, cut where padding to the longest would waste too much."""
    ordered = sorted(spans, key=lambda span: (span[1] - span[0], span[0]), reverse=True)
    rectangles: list[list[tuple[int, int]]] = []
    for start, stop in ordered:
        if rectangles:
            longest = rectangles[-1][0][1] - rectangles[-1][0][0]
            if stop - start >= GROUP_FILL * longest:
                rectangles[-1].append((start, stop))
                continue
        rectangles.append([(start, stop)])
    return rectangles


def _occurrences(order: np.ndarray, kept: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, places) of the first copy of every token, in order; of the second ones; and so on."""
    tokens = order[kept]
    ascending = np.argsort(tokens, kind="stable")
    tokens, places = tokens[ascending], kept[ascending]
    copy = np.arange(len(tokens)) - np.searchsorted(tokens, tokens)  # copies of the same token before it
    return [(tokens[copy == n], places[copy == n]) for n in range(int(copy.max()) + 1)]


def into_rows(tokens: Tensor, segments: Segments) -> Tensor:
    """[Q, ...] of [T, ...]: every token at each of its places, and padding."""
    if segments.gather is None:
        return tokens
    flat = [index for pair in segments.copies for index in pair]
    rows: Tensor = _Into.apply(tokens, segments.gather, segments.inverse, *flat)
    return rows


def out_of_rows(rows: Tensor, segments: Segments) -> Tensor:
    """[T, ...] of [Q, ...]: what came out at each token's first place."""
    if segments.inverse is None:
        return rows
    tokens: Tensor = _OutOf.apply(rows, segments.inverse, segments.gather)
    return tokens


class _Into(torch.autograd.Function):
    """Padding's gradient is zero, since no query sees a padding key: a gather, and a sum over copies.

    No token occurs twice in one round of copies, so the sum has one order on every device.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gather: Tensor, inverse: Tensor, *copies: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, *copies)
        return tokens.index_select(0, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse, *copies = ctx.saved_tensors
        total = grad.index_select(0, inverse)
        for tokens, places in zip(copies[::2], copies[1::2], strict=True):
            total.index_add_(0, tokens, grad.index_select(0, places))
        return total, None, None, *[None] * len(copies)


class _OutOf(torch.autograd.Function):
    """What is not taken, padding and later copies, has gradient zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: Tensor, gather: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, gather)
        return rows.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        inverse, gather = ctx.saved_tensors
        if len(gather) == len(inverse):  # everything was taken
            return grad.index_select(0, gather), None, None
        rows = grad.new_zeros(len(gather), *grad.shape[1:])
        return rows.index_add_(0, inverse, grad), None, None  # on CPUs twice as fast as index_copy_
