"""What came out of one rollout, as the numbers that a policy is trained on. Knows no model and no loss.

An iteration's answers are N sequences in G groups (the answers to one prompt). What is known per answer
token lies end to end in flat tensors of Q tokens, alike on every rank, so that statistics, the contents of
minibatches and their order cannot depend on the number of ranks. Only `cut` looks at this rank's share.
The tools that plan and collate are the data room's and come in as a `Packing`. K: trained positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from framework.batch import Batch, RolloutBatch
from framework.rollout.base import Completion, Prompt

Averaging = Literal["token", "sequence", "constant"]

PER_TOKEN = ("advantages", "old_logps", "correction", "reference_logps", "old_values", "returns")
"""Fields of an `Experience` that a `RolloutBatch` carries under the same name."""


@dataclass(frozen=True)
class Packing:
    """How sequences become micro-batches: the data room's tools with their settings bound."""

    plan: Callable[[Sequence[int]], list[list[list[int]]]]  # lengths [n] -> positions [ranks][micros][...]
    collate: Callable[[Sequence[tuple[np.ndarray, np.ndarray]]], Batch]  # (ids, trained) of each sequence
    fill: Callable[[], Batch]  # the smallest batch that counts nothing
    tokens_per_micro: int  # the budget that `plan` keeps
    rank: int
    shared: Callable[[Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]], Batch] | None = None
    """Collates (prompt ids, ids of its answers) with the prompt's tokens once; segments in that order."""


@dataclass(frozen=True, kw_only=True)
class Experience:
    """N answers and what is known of their Q tokens; fields that are not known (yet) are None.

    Tensors are on the CPU and of fp64: they are few, and what is computed from them decides gradients.
    """

    prompts: Sequence[Prompt]  # [N], the prompt of each answer
    completions: Sequence[Completion]  # [N]
    groups: Tensor  # [N] int64, from 0; answers to one prompt share a group and lie together
    offsets: Tensor  # [N + 1] int64, where each answer's tokens begin in the flat tensors, then Q
    rewards: Tensor  # [N] as the reward gave them; NaN: it failed
    scores: Tensor  # [N] after shaping
    counted: Tensor  # [N] bool, whether it is trained on
    sampler_logps: Tensor | None = None  # [Q] nats, of the rollout engine
    old_logps: Tensor | None = None  # [Q] nats, of the trainer before the first update
    reference_logps: Tensor | None = None  # [Q] nats
    entropies: Tensor | None = None  # [Q] nats, of the trainer's policy
    old_values: Tensor | None = None  # [Q]
    correction: Tensor | None = None  # [Q]
    advantages: Tensor | None = None  # [Q]
    returns: Tensor | None = None  # [Q]

    @classmethod
    def of(cls, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], rewards: Tensor) -> Self:
        """The answers [groups][G] to `prompts` [groups] with their rewards [N], in order.

        An answer whose reward is not finite is not counted: what failed to be judged was not judged bad.
        """
        completions = [completion for group in answers for completion in group]
        lengths = torch.tensor([len(completion.ids) for completion in completions])
        sizes = torch.tensor([len(group) for group in answers])
        rewards = torch.where(rewards.isfinite(), rewards, torch.nan).double()
        known = all(len(completion.logps) == len(completion.ids) for completion in completions)
        return cls(
            prompts=[p for p, group in zip(prompts, answers, strict=True) for _ in group],
            completions=completions,
            groups=torch.repeat_interleave(torch.arange(len(prompts)), sizes),
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            rewards=rewards,
            scores=rewards,
            counted=~rewards.isnan(),
            sampler_logps=flat(completion.logps for completion in completions) if known else None,
        )

    @property
    def lengths(self) -> Tensor:
        """[N] int64, tokens of each answer."""
        return self.offsets.diff()

    @property
    def owners(self) -> Tensor:
        """[Q] int64, the sequence that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.completions)), self.lengths)

    @property
    def counted_tokens(self) -> Tensor:
        """[Q] bool."""
        return torch.repeat_interleave(self.counted, self.lengths)

    @property
    def finished(self) -> Tensor:
        """[N] bool, whether the answer ended by itself."""
        return torch.tensor([completion.finished for completion in self.completions], dtype=torch.bool)

    def total(self, sequence: int) -> int:
        """Tokens of one sequence, prompt and answer."""
        return len(self.prompts[sequence].ids) + len(self.completions[sequence].ids)


def flat(rows: Any) -> Tensor:
    """[Q] fp64 of rows of numbers, end to end."""
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def spread(scores: Tensor, groups: Tensor) -> Tensor:
    """[groups] bool: whether a group's scores differ, NaN left out. A group without spread teaches nothing.

    By maximum and minimum: the standard deviation of seven times 0.3 is not 0 in floating point.
    """
    count = int(groups[-1]) + 1
    known = ~scores.isnan()
    highest = torch.full((count,), -math.inf, dtype=scores.dtype)
    highest = highest.scatter_reduce(0, groups[known], scores[known], "amax")
    lowest = torch.full((count,), math.inf, dtype=scores.dtype)
    lowest = lowest.scatter_reduce(0, groups[known], scores[known], "amin")
    return highest > lowest


@dataclass
class Running:
    """Mean and standard deviation of all scores seen so far (Chan et al. 1983: moments of parts add)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def add(self, scores: Tensor) -> None:
        """Take [n] more scores."""
        if not scores.numel():
            return
        n, mean = float(scores.numel()), float(scores.mean())
        total, shift = self.count + n, mean - self.mean
        self.squares += float((scores - mean).square().sum()) + shift * shift * self.count * n / total
        self.mean += shift * n / total
        self.count = total

    @property
    def std(self) -> float:
        """With Bessel's correction; 1 while it says nothing (fewer than two scores, or all equal)."""
        if self.count < 2 or self.squares <= 0:
            return 1.0
        return math.sqrt(self.squares / (self.count - 1))


@dataclass(frozen=True)
class Shaping:
    """From a reward to the score that is learnt from, in this order.

    With `within_prompt` minus the mean reward of the answers to the same prompt, as a reward model's numbers
    compare no others. (reward - mean) / std, with the two numbers given or, with `running`, those of all
    rewards so far; then minus `missing_eos_penalty` where the answer did not end by itself; then clipped to
    +- `clip`.
    """

    mean: float = 0.0
    std: float = 1.0
    running: bool = False
    missing_eos_penalty: float = 0.0
    clip: float | None = None
    within_prompt: bool = False

    def __call__(
        self, rewards: Tensor, finished: Tensor, seen: Running, groups: Tensor | None = None
    ) -> Tensor:
        """[N] scores of [N] rewards (NaN stays NaN); `seen` is updated when it is used.

        `groups` [N] int64 from 0: answers to one prompt share one; needed `within_prompt` alone.
        """
        mean, std = self.mean, self.std
        if self.within_prompt:
            assert groups is not None
            rewards = rewards - _means(rewards, groups)[groups]
        if self.running:
            seen.add(rewards[~rewards.isnan()])
            mean, std = seen.mean, seen.std
        scores = (rewards - mean) / std - self.missing_eos_penalty * (~finished).to(rewards.dtype)
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)


def _means(rewards: Tensor, groups: Tensor) -> Tensor:
    """[groups] mean reward of each, NaN left out."""
    known = ~rewards.isnan()
    totals = torch.zeros(int(groups[-1]) + 1, dtype=rewards.dtype)
    counts = torch.zeros_like(totals).index_add(0, groups, known.to(rewards.dtype))
    return totals.index_add(0, groups, rewards.nan_to_num(nan=0.0)) / counts


def token_rewards(scores: Tensor, offsets: Tensor, penalties: Tensor | None = None) -> Tensor:
    """[Q] rewards: each answer's score [N] at its last token, minus `penalties` [Q] at every token.

    A score that is NaN gives 0: such an answer is not counted, and must not spoil sums over all tokens.
    """
    rewards = torch.zeros(int(offsets[-1]), dtype=torch.float64)
    if penalties is not None:
        rewards -= penalties
    rewards[offsets[1:] - 1] += scores.nan_to_num(nan=0.0)
    return rewards


def minibatches(experience: Experience, *, sequences: int, order: torch.Generator) -> list[list[int]]:
    """All N sequences, shuffled by group, cut into ceil(N / `sequences`) parts of nearly equal size.

    Answers to one prompt stay together, except where a cut falls between them: they are compared with one
    another, and can share their prompt's tokens.
    """
    groups = experience.groups.tolist()
    members: dict[int, list[int]] = {}
    for sequence, group in enumerate(groups):
        members.setdefault(group, []).append(sequence)
    shuffled = torch.randperm(len(members), generator=order).tolist()
    line = [sequence for group in shuffled for sequence in members[group]]
    parts = -(-len(line) // sequences)
    return [part.tolist() for part in np.array_split(np.array(line), parts)]


def cut(experience: Experience, chosen: Sequence[int], packing: Packing) -> list[tuple[Batch, Tensor]]:
    """This rank's micro-batches of the `chosen` sequences, as many on every rank.

    With each comes [K] int64, which of the Q tokens each trained position predicts; empty for a fill.
    """
    pieces = _pieces(experience, chosen, packing)
    planned = packing.plan([_tokens(experience, piece) for piece in pieces])[packing.rank]
    return [_batch(experience, [pieces[i] for i in row], packing) for row in planned]


def _pieces(experience: Experience, chosen: Sequence[int], packing: Packing) -> list[list[int]]:
    """What is planned as a whole: one sequence or, with shared prompts, answers to one that fit together."""
    if packing.shared is None:
        return [[sequence] for sequence in chosen]
    pieces: list[list[int]] = []
    for sequence in chosen:
        if pieces and experience.groups[pieces[-1][0]] == experience.groups[sequence]:
            joined = [*pieces[-1], sequence]
            if _tokens(experience, joined) <= packing.tokens_per_micro:
                pieces[-1] = joined
                continue
        pieces.append([sequence])
    return pieces


def _tokens(experience: Experience, piece: Sequence[int]) -> int:
    """Tokens of answers to one prompt, the prompt counted once."""
    answers = sum(len(experience.completions[sequence].ids) for sequence in piece)
    return len(experience.prompts[piece[0]].ids) + answers


def _batch(experience: Experience, pieces: Sequence[Sequence[int]], packing: Packing) -> tuple[Batch, Tensor]:
    if not pieces:
        return packing.fill(), torch.empty(0, dtype=torch.int64)
    chosen = [sequence for piece in pieces for sequence in piece]
    if packing.shared is not None:
        batch = packing.shared(
            [
                (experience.prompts[piece[0]].ids, [experience.completions[s].ids for s in piece])
                for piece in pieces
            ]
        )
    else:
        batch = packing.collate([_example(experience, sequence) for sequence in chosen])
    starts = experience.offsets.tolist()
    in_order = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in chosen])  # [K] by segment
    tokens = torch.empty_like(in_order)
    tokens[torch.argsort(batch.segments, stable=True)] = in_order
    return batch, tokens


def _example(experience: Experience, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, trained) of a prompt and its answer; every answer token is trained, the end included."""
    prompt, answer = experience.prompts[sequence].ids, experience.completions[sequence].ids
    ids = np.array([*prompt, *answer], dtype=np.int64)
    return ids, np.arange(len(ids)) >= len(prompt)


def rollout_batches(
    experience: Experience,
    chosen: Sequence[int],
    packing: Packing,
    *,
    averaging: Averaging,
    longest: int,
) -> list[RolloutBatch]:
    """`cut`, with what the losses need, weighted for the way of averaging.

    token: every counted token weighs 1, units are tokens. sequence: 1 / n_i in an answer of n_i tokens, units
    are sequences. constant: 1 / `longest`, the most tokens an answer may have, units are sequences. What is
    not counted weighs 0 and is no unit.
    """
    per_sequence = {
        "token": torch.ones(len(experience.completions), dtype=torch.float64),
        "sequence": 1.0 / experience.lengths.double(),
        "constant": torch.full((len(experience.completions),), 1.0 / longest, dtype=torch.float64),
    }[averaging]
    weights = torch.repeat_interleave(per_sequence * experience.counted, experience.lengths)  # [Q]
    owners = experience.owners
    known: Mapping[str, Tensor] = {
        name: value for name in PER_TOKEN if (value := getattr(experience, name)) is not None
    }
    batches = []
    for batch, tokens in cut(experience, chosen, packing):
        if not tokens.numel():
            nothing = torch.zeros(len(batch.trained))
            batches.append(_with(batch, dict.fromkeys(known, nothing)))
            continue
        counted = weights[tokens] > 0
        units = counted.sum() if averaging == "token" else owners[tokens[counted]].unique().numel()
        batch = replace(batch, weights=weights[tokens].float(), units=float(units))
        batches.append(_with(batch, {name: value[tokens].float() for name, value in known.items()}))
    return batches


def _with(batch: Batch, extra: Mapping[str, Tensor]) -> RolloutBatch:
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    return RolloutBatch(**(values | dict(extra)))
