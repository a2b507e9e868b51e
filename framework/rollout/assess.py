"""Evaluation by answering: a policy answers held-out prompts, rewards judge, numbers and samples come out.

Knows no trainer and no stage. Letters: N answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from framework.rollout.base import Completion, Prompt, Rollout, Sampling
from framework.rollout.judge import Judged

RUN = 3  # tokens in the runs that repetition is measured by
REFERENCES = ("answer", "reference", "solution")  # fields of a row that may hold the right answer


@dataclass(frozen=True)
class Assessment:
    """How a policy answered, alike on every rank."""

    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]]  # rows for people: prompt, reference, answer, score, finished
    scores: Tensor  # [N] fp64, NaN where judging failed
    right: Tensor | None  # [N] fp64 1, 0 or NaN, by the verifier where there is one


class Assessor:
    """Asks `rollout` the same `prompts` whenever it is called.

    `judge` says what answers are worth (a `judge.Judge`); `verifier` names the one of its rewards that
    decides accuracy: an answer is right when that gives 1 and the answer ended by itself. `decode` turns
    token ids into text for the `shown` samples.

    Metrics: `accuracy`; `score` and each reward's mean; `answer_tokens`; `finished_share`;
    `distinct_runs`, different runs of three tokens over all runs of an answer, so that 1 is no repetition;
    `nats_per_token`, the mean of -log p of what was drawn, an estimate of the policy's entropy when drawn at
    temperature 1; `failed_share`. Answers that could not be judged are left out of means.
    """

    def __init__(
        self,
        rollout: Rollout,
        prompts: Sequence[Prompt],
        judge: Callable[[Sequence[Prompt], Sequence[Completion]], Judged],
        sampling: Sampling,
        *,
        decode: Callable[[Sequence[int]], str],
        verifier: str | None = None,
        shown: int = 8,
    ) -> None:
        self.rollout, self.prompts, self.judge, self.sampling = rollout, prompts, judge, sampling
        self.decode, self.verifier, self.shown = decode, verifier, shown

    def __call__(self) -> Assessment:
        """Answer and judge with the weights that the rollout holds now. Collective."""
        answers = self.rollout.generate(self.prompts, self.sampling)
        asked = [p for p, group in zip(self.prompts, answers, strict=True) for _ in group]
        given = [answer for group in answers for answer in group]
        judged = self.judge(asked, given)
        right = None
        metrics = {"score": float(judged.scores.nanmean())}
        if self.verifier is not None:
            right = _right(judged.parts[self.verifier], given)
            metrics["accuracy"] = float(right.nanmean())
        metrics |= {"failed_share": float(judged.scores.isnan().double().mean())}
        metrics |= {name: value for name, value in judged.metrics.items() if name.startswith("reward/")}
        metrics |= of_answers(given)
        samples = [
            self._shown(*each)
            for each in list(zip(asked, given, judged.scores.tolist(), strict=True))[: self.shown]
        ]
        return Assessment(metrics, samples, judged.scores, right)

    def _shown(self, prompt: Prompt, answer: Completion, score: float) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": self.decode(prompt.ids)}
        reference = next((prompt.row[name] for name in REFERENCES if name in prompt.row), None)
        row |= {} if reference is None else {"reference": str(reference)}
        known = None if math.isnan(score) else score  # JSON has no NaN
        return row | {"answer": answer.text, "score": known, "finished": answer.finished}


def of_answers(answers: Sequence[Completion]) -> dict[str, float]:
    """What can be said of answers that nobody has judged (see `Assessor`); without a value, no name."""
    nats = [-nat for answer in answers for nat in answer.logps]
    varied = [distinct(answer.ids) for answer in answers]
    known = [share for share in varied if share is not None]
    metrics = {
        "answer_tokens": fmean(len(answer.ids) for answer in answers),
        "finished_share": fmean(answer.finished for answer in answers),
    }
    metrics |= {"distinct_runs": fmean(known)} if known else {}
    return metrics | ({"nats_per_token": fmean(nats)} if nats else {})


def distinct(ids: Sequence[int], run: int = RUN) -> float | None:
    """Different runs of `run` tokens over all of them (distinct-n, Li et al. 2016, arXiv 1510.03055); None
    where the answer is shorter than one."""
    runs = [tuple(ids[start : start + run]) for start in range(len(ids) - run + 1)]
    return len(set(runs)) / len(runs) if runs else None


def _right(scores: Tensor, answers: Sequence[Completion]) -> Tensor:
    ended = torch.tensor([answer.finished for answer in answers])
    right = ((scores == 1.0) & ended).double()
    return right.where(~scores.isnan(), torch.nan)
