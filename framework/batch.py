"""Frozen records of what a forward pass takes and what it answers. Knows no file, no loss, no rank.

Letters: R rows, T tokens in a row, S segments (documents), K trained positions, P places (see `Batch`),
k of n tokens of a vocabulary.

A micro-batch is *packed* by default: one row (R = 1) holds whole segments end to end, with
`position_ids` starting again at 0 in each and `boundaries` between them. *Padded* (R = S) holds one
segment a row, padded on the right. Everything after the model's body works on the K trained
positions only, so losses see no difference between the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank.

    `trained[k]` is the flat index (into R*T) of the position whose *next* token is trained, and
    `targets[k]` is that next token: the causal shift is done once, where batches are made.
    `units` is this batch's addend to the step's denominator, known before any forward pass.

    Segments that begin alike may share those tokens: the row then holds them once, and `places` says
    which token stands at each place of the rows that attention sees.
    """

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64, from 0 in every segment
    boundaries: Tensor  # [S + 1] int32, first place of each segment in the packed row, then P
    trained: Tensor  # [K] int64, flat positions: by segment, ascending in each; shared ones come again
    targets: Tensor  # [K] int64, token ids
    weights: Tensor  # [K] fp32, 0 = not counted
    segments: Tensor  # [K] int64, the segment of each trained position
    sources: Tensor  # [S] int64, the source each segment came from; -1 in a fill
    packed: bool  # True: R = 1 and `boundaries` rules; False: one segment a row
    max_length: int  # tokens in the longest segment
    units: float  # this batch's addend to the step's denominator
    places: Tensor | None = None  # [P] int64, the token at each place; None: P = T, in order

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted, shared ones once."""
        return int(self.boundaries[-1]) if self.places is None else self.input_ids.numel()

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`; `sources`, which only metrics read, stays where it is."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and f.name != "sources"
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """Answers in twos: segments 2n and 2n + 1 are the chosen and the rejected one of pair n of N.

    For preference losses the trained positions are those of the answers; for reward models they are
    the last token of each segment, so K = S and `targets` mean nothing.
    """

    pair_weights: Tensor  # [N] fp32, 0 = not counted; 1, or 1 / C(k, 2) in a ranking of k answers
    margins: Tensor  # [N] fp32, by how much the chosen one should win; 0 where the data says nothing
    reference_logps: Tensor | None = None  # [K] fp32 nats, the reference's answer to `targets`
    matched: Tensor | None = None  # [N] fp32 nats, the reference's difference of the same rank in the step
    matched_chosen: Tensor | None = None  # [N] fp32 nats, the chosen log-ratio of the rejected one's rank
    matched_rejected: Tensor | None = None  # [N] fp32 nats, the rejected log-ratio of the chosen one's rank
    tokens_per_pair: float | None = None  # trained chosen tokens of the whole step over its pairs


@dataclass(frozen=True, kw_only=True)
class LabelledBatch(Batch):
    """Single answers that were liked or not: unpaired preference data."""

    desirable: Tensor  # [S] bool
    segment_weights: Tensor  # [S] fp32, 0 = not counted
    reference_logps: Tensor | None = None  # [K] fp32 nats
    baseline: float | None = None  # nats, what a log-ratio is measured from, of the whole step


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(Batch):
    """Generated answers with what was known when they were made; the trained positions are theirs.

    `weights` carry the way of averaging (token, sequence, constant length) and `units` its denominator.
    """

    advantages: Tensor  # [K] fp32
    old_logps: Tensor | None = None  # [K] fp32 nats, of the policy before the first update; None: this is it
    correction: Tensor | None = None  # [K] fp32, weight for the difference between sampler and trainer
    reference_logps: Tensor | None = None  # [K] fp32 nats
    old_values: Tensor | None = None  # [K] fp32, the critic's before the first update
    returns: Tensor | None = None  # [K] fp32, what the critic learns


@dataclass(frozen=True, kw_only=True)
class TaughtBatch(Batch):
    """Text to imitate with what a teacher would have said: k of n tokens at each trained position."""

    teacher_ids: Tensor | None  # [K, k] int64, the likeliest first; None: see `teacher_head`
    teacher_logps: Tensor | None  # [K, k] fp32 nats, in a `Distribution` over n tokens
    teacher_head: Any = None  # `losses.whole.Head`, of which all n tokens come a chunk at a time


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """What to answer beside the targets' log-probabilities: some of the distribution at each position.

    At `ids`, or of the `likeliest`. Of all tokens that take part, `deferred` asks for what they come of, with
    the head of an earlier such answer if there is one, and `divergence` for a comparison with another
    model's.
    """

    vocabulary: int  # n, the first so many tokens, over which the probabilities sum to 1
    temperature: float  # that divides their logits
    ids: Tensor | None = None  # [K, k] int64 below n
    likeliest: int | None = None  # k
    deferred: bool = False
    divergence: Any = None  # `losses.whole.Divergence`, from `teacher`
    teacher: Any = None  # `losses.whole.Head`


class Outputs(NamedTuple):
    """What a model answers: numbers per trained position, never a [tokens, vocabulary] tensor.

    A NamedTuple, so that the hooks of FSDP2 and DeepSpeed find the tensors in it.
    """

    logps: Tensor  # [K] fp32 nats, log-probability of `Batch.targets`
    entropies: Tensor | None = None  # [K] fp32 nats, only when asked for
    mean_logps: Tensor | None = None  # [K] fp32 nats, mean over the vocabulary, only when asked for
    collisions: Tensor | None = None  # [K] fp32 nats, log of the sum of squared probabilities, likewise
    values: Tensor | None = None  # [K] fp32, the critic's value of the state that predicts the token
    candidate_ids: Tensor | None = None  # [K, k] int64, those found where the likeliest were asked for
    candidate_logps: Tensor | None = None  # [K, k] fp32 nats, only with a `Distribution`
    divergences: Tensor | None = None  # [K] fp32, only with one that has a divergence
    counted: Tensor | None = None  # [K] fp32, likewise: the weights that the divergence leaves
    metrics: Mapping[str, Tensor] | None = None  # each [K] fp32, likewise: what else it says
    head: Any = None  # `losses.whole.Head`, only with one that is deferred; `logps` is empty then


class Scores(NamedTuple):
    """What a reward model or a critic alone answers."""

    scores: Tensor  # [K] fp32, one for each of `Batch.trained`
