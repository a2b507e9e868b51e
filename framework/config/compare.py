"""Models side by side on questions nobody trained on: how often right, how liked, what was forgotten.

A step of a pipeline. It reads models as anybody would load them, one at a time beside the one they are
compared with and the one that judges. Letters: N questions, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.config.steps import verdict
from framework.data import tasks
from framework.data.sources import Source
from framework.data.tables import Table
from framework.data.tables import prepare as tokenised
from framework.errors import ConfigError
from framework.keyed import key
from framework.models import answering
from framework.rollout.hf import generate
from framework.rollout.intervals import share, win_rate


def models(
    directory: Path,
    *,
    models: Mapping[str, str],
    against: str,
    held_out: str,
    general: str | None = None,
    judge: str | None = None,
    max_new_tokens: int = 32,
    kl_questions: int = 64,
    shown: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Each of `models` (name: path) on the task rows of `held_out`, and beside the one called `against`.

    accuracy: share of greedy answers that the verifier calls exactly right and that ended by themselves.
    win_rate: share of questions where only this model is right, plus half of those where both or neither is.
    reward: mean score of the greedy answers, as they stand, by the reward model `judge`; judged_win_rate:
    share of questions where it scores this model's answer higher, ties half; NaN is left out of both. Shares
    come with their intervals (`rollout.intervals`). kl: nats a token from `against`, the mean over the tokens
    of answers that this model samples to the first `kl_questions` of the whole sum over V of
    p (log p - log q), temperature 1. general_loss: nats a token of the answers in `general`. length: tokens
    of a greedy answer. Raises ConfigError, DataError, ModelError.
    """
    if against not in models:
        raise ConfigError(f"against: found {against}; expected one of models: {', '.join(models)}")
    scorer: Any = None
    if judge is not None:
        scorer, words = answering.load_scorer(judge, dtype=torch.bfloat16)
    rows = tasks.read(Path(held_out))
    questions = tasks.questions(rows)
    samples: list[dict[str, str]] = [
        {"prompt": row["question"], "reference": row["answer"]} for row in rows[:shown]
    ]
    measured: dict[str, dict[str, Any]] = {}
    right: dict[str, Tensor] = {}  # [N] fp64, 1 or 0
    liked: dict[str, Tensor] = {}  # [N] fp64
    reference, _ = answering.load(models[against], dtype=torch.bfloat16)
    for name, path in models.items():
        lm, tokenizer = answering.load(path, dtype=torch.bfloat16)
        if scorer is not None and tokenizer.get_vocab() != words.get_vocab():
            raise ConfigError(
                f"judge: {judge} has another vocabulary than {name}, whose answers it would have to read; "
                "expected a reward model of the same family"
            )
        asked = [_ids(tokenizer, question) for question in questions]
        answers = generate(lm, tokenizer, questions, max_new_tokens=max_new_tokens)
        verdicts = [bool(verdict(answer, row)) for answer, row in zip(answers, rows, strict=True)]
        right[name] = torch.tensor(verdicts, dtype=torch.float64)
        for sample, answer in zip(samples, answers, strict=False):
            sample[name] = answer.text
        measured[name] = {
            "accuracy": list(share(sum(verdicts), len(rows) - sum(verdicts))),
            "length": sum(len(answer.ids) for answer in answers) / len(answers),
        }
        if scorer is not None:
            liked[name] = _scores(scorer, asked, [answer.ids for answer in answers])
            measured[name] |= _known("reward", float(liked[name].nanmean()))
        if name != against:
            drawn = generate(
                lm,
                tokenizer,
                questions[:kl_questions],
                max_new_tokens=max_new_tokens,
                temperature=1.0,
                seed=key(seed, "kl"),
            )
            told = [answer.ids for answer in drawn]
            measured[name]["kl"] = _distance(lm, reference, asked[:kl_questions], told)
        if general is not None:
            (table,) = tokenised(
                [Source(general)], tokenizer=tokenizer, max_length=2048, cache_dir=directory / "cache"
            )
            measured[name]["general_loss"] = loss(lm, table)
    for name in measured:
        for measure, scores in (("win_rate", right), ("judged_win_rate", liked)):
            if name != against and scores:
                measured[name] |= _known(measure, *win_rate(scores[name], scores[against]))
    facts = {"questions": len(rows)}
    return {"measured": measured, "against": against, "samples": samples, "facts": facts}


def _known(measure: str, value: float, *interval: float) -> dict[str, Any]:
    """A measure as it is written, and nothing where it has no value."""
    return {} if math.isnan(value) else {measure: [value, *interval] if interval else value}


@torch.inference_mode()
def loss(lm: Any, table: Table) -> float:
    """Mean nats of all trained tokens of a table."""
    total, count = 0.0, 0
    for row in range(len(table)):
        ids, trained = (torch.tensor(part) for part in table.example(row))
        targets = trained[1:].nonzero()[:, 0] + 1  # [K] places of trained tokens that have one before them
        logps = _log_probabilities(lm, ids.tolist(), targets - 1)
        total -= float(logps.gather(1, ids[targets, None].to(logps.device).long()).sum())
        count += len(targets)
    return total / count


@torch.inference_mode()
def _scores(scorer: Any, prompts: Sequence[list[int]], answers: Sequence[Sequence[int]]) -> Tensor:
    """[N] fp64: what the reward model says at the last token of each answer.

    Transformers' own pooling looks for the last token that is not padding, which for many models is the one
    that ends an answer.
    """
    body, head = scorer.base_model, scorer.score.weight[0].float()
    scores = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]], device=scorer.device)
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        scores.append(float(hidden.float() @ head))
    return torch.tensor(scores, dtype=torch.float64)


def _distance(
    lm: Any, reference: Any, prompts: Sequence[list[int]], answers: Sequence[Sequence[int]]
) -> float:
    """Mean over all answer tokens of KL(lm || reference) in nats."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = [*prompt, *answer]
            before = torch.arange(len(prompt) - 1, len(ids) - 1)
            p, q = (_log_probabilities(model, ids, before) for model in (lm, reference))
            total += float((p.exp() * (p - q)).sum())
            count += len(answer)
    return total / count


def _log_probabilities(lm: Any, ids: list[int], places: Tensor) -> Tensor:
    """[places, V] fp32, of the token after each place."""
    logits = lm(input_ids=torch.tensor([ids], device=lm.device), use_cache=False).logits[0]
    return logits[places.to(logits.device)].float().log_softmax(-1)


def _ids(tokenizer: Any, question: Sequence[Mapping[str, str]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(question), add_generation_prompt=True, return_dict=False
    )
    return ids
