"""Judged answers to micro-batches: pairs for preference losses and reward models, single answers, and single
answers to the prompts of others.

Each class here is a `loader.Kind`. Letters as in `framework.batch`; N pairs, p prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from framework.batch import LabelledBatch, PairBatch
from framework.data.answers import AnswerTable
from framework.data.collate import Extent, Where
from framework.data.shared import Tree, int64, lay_out, learnt

Tables = Sequence[AnswerTable]


@dataclass(frozen=True)
class Pairs:
    """All pairs of an example in one micro-batch, weighted 1 / C(K, 2) in an example of K answers.

    `sharing` stores a prompt, and an answer that is in several pairs, once in a packed row; for models whose
    attention `shares_prompts`. `scored`: the last token of each segment is trained, for reward models,
    instead of every token of the answers.
    """

    sharing: bool
    scored: bool = False

    def extent(self, tables: Tables, where: Where, at: int, *, packing: bool) -> Extent:
        """What example `at` of a step takes."""
        source, row = where[at]
        table = tables[source]
        prompt, sizes, pairs = int(table.prompts[row]), table.sizes(row), table.pairs(row)
        if packing and self.sharing:
            return Extent(int(table.lengths[row]), prompt + int(sizes.max()), 1)
        return Extent(int(sizes[pairs].sum()) + prompt * pairs.size, prompt + int(sizes.max()), pairs.size)

    def facts(self, tables: Tables, source: int, row: int) -> Mapping[str, float]:
        """`pairs` and `chosen_tokens` are weighted: their quotient is the mean that a loss per pair needs."""
        table = tables[source]
        pairs, weight = table.pairs(row), _weight(table, row)
        return {
            "trained_tokens": float(table.answers[row] if self.scored else table.trained[row]),
            "pairs": weight * len(pairs),
            "chosen_tokens": weight * float(table.learnt(row)[pairs[:, 0]].sum()),
        }

    def collate(
        self, tables: Tables, where: Where, chosen: Sequence[int], *, packing: bool, pad_id: int
    ) -> PairBatch:
        """The examples `chosen` of a step; none give a fill: one pair of weight 0."""
        if not chosen:
            two = np.full(1, pad_id)
            layout = lay_out(
                [Tree(two, [two])] * 2, [(0, 0), (1, 0)], packing=packing, sharing=False, pad_id=pad_id
            )
            masks = [np.ones(1, dtype=bool)] * 2
            fields = self._scored(learnt(layout, [two, two], masks, [-1, -1]), layout.last)
            fields["weights"] = torch.zeros(2)
            return PairBatch(**fields, units=0.0, pair_weights=torch.zeros(1), margins=torch.zeros(1))
        examples = [tables[source].judged(row) for source, row in (where[i] for i in chosen)]
        trees = [Tree(example.prompt, example.ids) for example in examples]
        segments = [(t, int(k)) for t, example in enumerate(examples) for k in example.pairs.ravel()]
        layout = lay_out(trees, segments, packing=packing, sharing=self.sharing and packing, pad_id=pad_id)
        fields = learnt(
            layout,
            [examples[t].ids[k] for t, k in segments],
            [examples[t].trained[k] for t, k in segments],
            [where[chosen[t]][0] for t, _ in segments],
        )
        weights = [np.full(len(e.pairs), _weight_of(len(e.ids)), dtype=np.float32) for e in examples]
        pair_weights = torch.from_numpy(np.concatenate(weights))
        return PairBatch(
            **self._scored(fields, layout.last),
            units=float(pair_weights.double().sum()),
            pair_weights=pair_weights,
            margins=torch.from_numpy(np.concatenate([example.margins for example in examples])),
        )

    def _scored(self, fields: dict[str, Any], last: np.ndarray) -> dict[str, Any]:
        if not self.scored:
            return fields
        count = len(last)
        return {
            **fields,
            "trained": int64(last),
            "targets": torch.zeros(count, dtype=torch.int64),
            "weights": torch.ones(count),
            "segments": torch.arange(count),
        }


def _weight(table: AnswerTable, row: int) -> float:
    return _weight_of(int(table.answers[row]))


def _weight_of(answers: int) -> float:
    """Of each pair of K answers: 1 / C(K, 2), so that a ranking counts as one (Ouyang et al. 2022, eq. 1)."""
    return 2.0 / (answers * (answers - 1))


@dataclass(frozen=True)
class Labelled:
    """One segment an example: an answer that was liked or not."""

    def extent(self, tables: Tables, where: Where, at: int, *, packing: bool) -> Extent:
        """What example `at` of a step takes."""
        source, row = where[at]
        length = int(tables[source].lengths[row])
        return Extent(length, length, 1)

    def facts(self, tables: Tables, source: int, row: int) -> Mapping[str, float]:
        """`desirable` counts the answers that were liked."""
        table = tables[source]
        return {
            "trained_tokens": float(table.trained[row]),
            "desirable": float(table.judged(row).desirable),
        }

    def collate(
        self, tables: Tables, where: Where, chosen: Sequence[int], *, packing: bool, pad_id: int
    ) -> LabelledBatch:
        """The examples `chosen` of a step; none give a fill: one answer of weight 0."""
        examples = [tables[source].judged(row) for source, row in (where[i] for i in chosen)]
        return _single(
            [(e.prompt, e.ids[0], e.trained[0]) for e in examples],
            [e.desirable for e in examples],
            [where[i][0] for i in chosen],
            packing=packing,
            pad_id=pad_id,
        )


@dataclass(frozen=True)
class Mismatched:
    """Example i is the prompt of a step's example i with the answer of the next, the last with the first's.

    For KTO's baseline (Ethayarajh et al. 2024, section 4.1). What exceeds `max_length` tokens is cut from the
    answer's end; a prompt always leaves room for one token.
    """

    max_length: int

    def extent(self, tables: Tables, where: Where, at: int, *, packing: bool) -> Extent:
        """What example `at` of a step takes."""
        (source, row), (other, answer) = where[at], where[(at + 1) % len(where)]
        tokens = int(tables[source].prompts[row]) + int(tables[other].sizes(answer)[0])
        length = min(tokens, self.max_length)
        return Extent(length, length, 1)

    def facts(self, tables: Tables, source: int, row: int) -> Mapping[str, float]:
        """Nothing in them is trained."""
        return {}

    def collate(
        self, tables: Tables, where: Where, chosen: Sequence[int], *, packing: bool, pad_id: int
    ) -> LabelledBatch:
        """The examples `chosen` of a step, as desirable as the prompt's own answer; none give a fill."""
        rows, desirable = [], []
        for i in chosen:
            (source, row), (other, answer) = where[i], where[(i + 1) % len(where)]
            own, next_one = tables[source].judged(row), tables[other].judged(answer)
            room = self.max_length - len(own.prompt)
            rows.append((own.prompt, next_one.ids[0][:room], next_one.trained[0][:room]))
            desirable.append(own.desirable)
        return _single(rows, desirable, [where[i][0] for i in chosen], packing=packing, pad_id=pad_id)


def _single(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    desirable: Sequence[bool],
    sources: Sequence[int],
    *,
    packing: bool,
    pad_id: int,
) -> LabelledBatch:
    """One segment a row of (prompt, answer, what is trained of it)."""
    weight = 1.0 if rows else 0.0
    if not rows:
        one = np.full(1, pad_id)
        rows, desirable, sources = [(one, one, np.ones(1, dtype=bool))], [True], [-1]
    trees = [Tree(prompt, [ids]) for prompt, ids, _ in rows]
    layout = lay_out(
        trees, [(t, 0) for t in range(len(trees))], packing=packing, sharing=False, pad_id=pad_id
    )
    fields = learnt(layout, [ids for _, ids, _ in rows], [trained for *_, trained in rows], sources)
    fields["weights"] = fields["weights"] * weight
    return LabelledBatch(
        **fields,
        units=weight * len(rows),
        desirable=torch.tensor(desirable),
        segment_weights=torch.full((len(rows),), weight),
    )
