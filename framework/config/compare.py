"""Models side by side on questions nobody trained on: how often right, how far apart, what was forgotten.

A step of a pipeline. It reads models as anybody would load them, one at a time beside the one they are
compared with. Letters: T tokens, V vocabulary.
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

Z = 1.959964  # of a 95 % interval of the normal law


def models(
    directory: Path,
    *,
    models: Mapping[str, str],
    against: str,
    held_out: str,
    general: str | None = None,
    max_new_tokens: int = 32,
    kl_questions: int = 64,
    shown: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Each of `models` (name: path) on the task rows of `held_out`, and beside the one called `against`.

    accuracy: share of greedy answers that the verifier calls exactly right and that ended by themselves,
    with Wilson's interval. win_rate: share of questions where only this model is right, plus half of those
    where both or neither is; the normal interval of the paired mean. kl: nats a token from `against`, the
    mean over the tokens of answers that this model samples to the first `kl_questions` of the whole
    sum over V of p (log p - log q), temperature 1. general_loss: nats a token of the answers in `general`.
    length: tokens of a greedy answer. Raises ConfigError, DataError, ModelError.
    """
    if against not in models:
        raise ConfigError(f"against: found {against}; expected one of models: {', '.join(models)}")
    rows = tasks.read(Path(held_out))
    questions = tasks.questions(rows)
    samples: list[dict[str, str]] = [
        {"prompt": row["question"], "reference": row["answer"]} for row in rows[:shown]
    ]
    measured: dict[str, dict[str, Any]] = {}
    right: dict[str, list[bool]] = {}
    reference, _ = answering.load(models[against], dtype=torch.bfloat16)
    for name, path in models.items():
        lm, tokenizer = answering.load(path, dtype=torch.bfloat16)
        answers = generate(lm, tokenizer, questions, max_new_tokens=max_new_tokens)
        right[name] = [bool(verdict(answer, row)) for answer, row in zip(answers, rows, strict=True)]
        for sample, answer in zip(samples, answers, strict=False):
            sample[name] = answer.text
        measured[name] = {
            "accuracy": wilson(sum(right[name]), len(rows)),
            "length": sum(len(answer.ids) for answer in answers) / len(answers),
        }
        if name != against:
            drawn = generate(
                lm,
                tokenizer,
                questions[:kl_questions],
                max_new_tokens=max_new_tokens,
                temperature=1.0,
                seed=key(seed, "kl"),
            )
            asked = [_ids(tokenizer, question) for question in questions[:kl_questions]]
            measured[name]["kl"] = _distance(lm, reference, asked, [answer.ids for answer in drawn])
        if general is not None:
            (table,) = tokenised(
                [Source(general)], tokenizer=tokenizer, max_length=2048, cache_dir=directory / "cache"
            )
            measured[name]["general_loss"] = loss(lm, table)
    for name in measured:
        if name != against:
            measured[name]["win_rate"] = win_rate(right[name], right[against])
    facts = {"questions": len(rows)}
    return {"measured": measured, "against": against, "samples": samples, "facts": facts}


def wilson(successes: int, trials: int) -> list[float]:
    """[share, low, high]: Wilson's 95 % interval (1927) of a binomial share, honest near 0 and 1."""
    share, spread = successes / trials, Z * Z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return [share, max(0.0, centre - half), min(1.0, centre + half)]


def win_rate(ours: Sequence[bool], theirs: Sequence[bool]) -> list[float]:
    """[rate, low, high]: wins count 1, ties half, over paired questions; 95 % interval of their mean."""
    points = torch.tensor([0.5 + (a - b) / 2 for a, b in zip(ours, theirs, strict=True)], dtype=torch.float64)
    rate = float(points.mean())
    half = Z * float(points.std(correction=0)) / math.sqrt(len(points))
    return [rate, max(0.0, rate - half), min(1.0, rate + half)]


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
