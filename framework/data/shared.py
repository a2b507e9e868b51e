"""Prompts with several answers each, laid out so that a packed row holds every prompt once.

    tokens   p p p c c c r r            positions  0 1 2 3 4 5 3 4
    places   p p p c c c | p p p r r    what attention sees: one segment an answer

The last prompt token predicts the first token of every answer. Packed or padded without sharing, every answer
has its own copy of the prompt. Letters as in `framework.batch`; p prompt tokens, a answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from framework.batch import Batch


class Tree(NamedTuple):
    """One prompt and its answers."""

    prompt: np.ndarray  # [p]
    answers: Sequence[np.ndarray]  # [a] each, a > 0


@dataclass(frozen=True)
class Layout:
    """Segments in rows. `before[s][t]` is the flat position that predicts answer token t of segment s."""

    tensors: dict[str, Any]  # fields of Batch: tokens, positions, boundaries, places, max_length, packed
    before: list[np.ndarray]  # S times [a] int64
    last: np.ndarray  # [S] int64, flat position of each segment's last token


def lay_out(
    trees: Sequence[Tree], segments: Sequence[tuple[int, int]], *, packing: bool, sharing: bool, pad_id: int
) -> Layout:
    """`segments` are (tree, answer), in the order they are to have; an answer may be in several.

    `sharing` holds prompts, and answers of several segments, once. It needs `packing`.
    """
    if sharing and len(segments) > len(trees):
        return _shared(trees, segments)
    lengths = [len(trees[t].prompt) + len(trees[t].answers[k]) for t, k in segments]
    boundaries, longest = np.concatenate([[0], np.cumsum(lengths)]), max(lengths)
    wholes = [np.concatenate([trees[t].prompt, trees[t].answers[k]]) for t, k in segments]
    if packing:
        begins, tokens = boundaries[:-1], np.concatenate(wholes)[None]
        positions = np.concatenate([np.arange(n) for n in lengths])[None]
    else:
        begins, tokens = np.arange(len(segments)) * longest, np.full((len(segments), longest), pad_id)
        for row, whole in zip(tokens, wholes, strict=True):
            row[: len(whole)] = whole
        positions = np.broadcast_to(np.arange(longest), tokens.shape).copy()
    before = [
        begin + len(trees[t].prompt) - 1 + np.arange(len(trees[t].answers[k]))
        for begin, (t, k) in zip(begins, segments, strict=True)
    ]
    last = begins + np.array(lengths) - 1
    return Layout(_tensors(tokens, positions, boundaries, longest, packing, None), before, last)


def _shared(trees: Sequence[Tree], segments: Sequence[tuple[int, int]]) -> Layout:
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    spans: dict[tuple[int, int], np.ndarray] = {}  # (tree, answer) -> [p + a] its tokens in the row
    at = 0
    for t, (prompt, answers) in enumerate(trees):
        tokens += [prompt, *answers]
        positions += [np.arange(len(prompt)), *(len(prompt) + np.arange(len(each)) for each in answers)]
        own = at + np.arange(len(prompt))
        at += len(prompt)
        for k, answer in enumerate(answers):
            spans[t, k] = np.concatenate([own, at + np.arange(len(answer))])
            at += len(answer)
    rows = [spans[segment] for segment in segments]
    lengths = [len(row) for row in rows]
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    before = []
    for row, (t, _) in zip(rows, segments, strict=True):
        p = len(trees[t].prompt)
        before.append(row[p - 1 : -1] if p else np.concatenate([[-1], row[:-1]]))  # -1: never trained
    tensors = _tensors(
        np.concatenate(tokens)[None],
        np.concatenate(positions)[None],
        boundaries,
        max(lengths),
        True,
        np.concatenate(rows),
    )
    return Layout(tensors, before, np.array([row[-1] for row in rows]))


def _tensors(
    tokens: np.ndarray,
    positions: np.ndarray,
    boundaries: np.ndarray,
    longest: int,
    packing: bool,
    places: np.ndarray | None,
) -> dict[str, Any]:
    return {
        "input_ids": int64(tokens),
        "position_ids": int64(positions),
        "boundaries": torch.from_numpy(boundaries.astype(np.int32)),
        "max_length": longest,
        "packed": packing,
        "places": None if places is None else int64(places),
    }


def learnt(
    layout: Layout, targets: Sequence[np.ndarray], trained: Sequence[np.ndarray], sources: Sequence[int]
) -> dict[str, Any]:
    """Fields of a Batch for `targets` [a] where `trained` [a], of each of S segments, in their order."""
    positions = [before[mask] for before, mask in zip(layout.before, trained, strict=True)]
    return {
        **layout.tensors,
        "trained": int64(np.concatenate(positions)),
        "targets": int64(np.concatenate([ids[mask] for ids, mask in zip(targets, trained, strict=True)])),
        "weights": torch.ones(sum(map(len, positions))),
        "segments": int64(np.repeat(np.arange(len(positions)), [len(each) for each in positions])),
        "sources": torch.tensor(sources, dtype=torch.int64),
    }


def collate_answers(
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], *, source: int = 0
) -> Batch:
    """Prompts [p] and the answers [a] to each, packed with every prompt once; all answer tokens are trained.

    Segments are the answers in order. For models whose attention `models.attention.shares_prompts`.
    """
    trees = [Tree(np.asarray(prompt), [np.asarray(each) for each in answers]) for prompt, answers in groups]
    segments = [(t, k) for t, tree in enumerate(trees) for k in range(len(tree.answers))]
    layout = lay_out(trees, segments, packing=True, sharing=True, pad_id=0)
    targets = [trees[t].answers[k] for t, k in segments]
    trained = [np.ones(len(ids), dtype=bool) for ids in targets]
    fields = learnt(layout, targets, trained, [source] * len(segments))
    return Batch(**fields, units=float(len(fields["trained"])))


def int64(values: np.ndarray) -> torch.Tensor:
    """A tensor of indices or token ids."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
