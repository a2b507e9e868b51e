"""What a chain of tasks has taught, kept and lost: every model of it on every task.

A step of a pipeline, like `config.compare`, whose numbers come from `rollout.transfer`. A task is a file of
held-out rows: answered greedily and verified where a score is named, else known by their likelihood.
Letters: N stages, n rows of a task.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from framework.config import compare, targets
from framework.config.nodes import Node, Target, Text
from framework.data import prompts
from framework.data.sources import Source
from framework.data.tables import prepare as tokenised
from framework.errors import ConfigError
from framework.models import answering
from framework.rollout import transfer
from framework.rollout.base import Completion
from framework.rollout.hf import complete
from framework.rollout.intervals import share
from framework.track.chain import MEANS

MAX_LENGTH = 2048  # tokens of a row


class Task(Node):
    """What a task is asked with."""

    path: Text  # held-out rows, of which none was trained on
    score: Text | None = None  # function of an answer and its row: 1 is right; None: likelihood
    options: Mapping[str, Any] = Field(default_factory=dict)  # of the score
    chance: float = Field(default=0.0, ge=0, lt=1)  # share of rows that a guess gets right
    learnt: Text | None = None  # the stage that teaches it; None: of its name; the first: known before


def matrix(
    directory: Path,
    trusted: Sequence[str],
    *,
    models: Mapping[str, str],
    tasks: Mapping[str, Mapping[str, Any]],
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """The matrix R[i][j], its means and what changed sides; `chain` of the step's result.json.

    `models` (name: path) in the order of training, the first as it came in; `tasks` (name: `Task`). With a
    score R is the share of greedy answers that it gives 1 and that ended by themselves, with the 95 %
    interval; without, exp(-loss), the geometric mean of the probability of the tokens to be said. Means are
    taken over tasks that are measured alike and that a stage teaches. Raises ConfigError, DataError,
    ModelError.
    """
    stages = list(models)
    asked = {name: _task(name, given, stages) for name, given in tasks.items()}
    verify = {name: _verifier(name, task, trusted) for name, task in asked.items()}
    answered: dict[str, list[list[bool]]] = {name: [] for name in asked}  # by stage, [n]
    losses: dict[str, list[float]] = {name: [] for name in asked}
    rows: dict[str, int] = {}
    for path in models.values():
        lm, tokenizer = answering.load(path, dtype=torch.bfloat16)
        reading = {"tokenizer": tokenizer, "cache_dir": directory / "cache"}
        for name, task in asked.items():
            source, score = Source(task.path), verify[name]
            if score is None:
                (table,) = tokenised([source], max_length=MAX_LENGTH, **reading)
                losses[name].append(compare.loss(lm, table))
                rows[name] = len(table)
                continue
            (questions,) = prompts.prepare([source], max_prompt_tokens=MAX_LENGTH, **reading)
            ids = [questions.example(row)[0].tolist() for row in range(len(questions))]
            answers = complete(lm, tokenizer, ids, max_new_tokens=max_new_tokens)
            verdicts = [_right(name, score, each, questions.row(row)) for row, each in enumerate(answers)]
            answered[name].append(verdicts)
            rows[name] = len(verdicts)
    found = {
        name: {**_of(task, stages, answered[name], losses[name]), "rows": rows[name]}
        for name, task in asked.items()
    }
    chain = {"stages": stages, "tasks": found, "means": _means(stages, found)}
    print(told(chain), file=sys.stderr, flush=True)
    (directory / "matrix.json").write_text(json.dumps(chain, indent=2) + "\n", encoding="utf-8")
    return {"chain": chain}


def told(chain: Mapping[str, Any]) -> str:
    """The matrix and its means for a terminal."""
    stages, found = chain["stages"], chain["tasks"]
    rows = [["", *stages, "forgetting", "rows", "of"]]
    for name, task in found.items():
        forgot = "" if task["forgetting"] is None else f"{task['forgetting']:+.3f}"
        scores = (
            f"{'*' if stage == task['learnt'] else ''}{value:.3f}"
            for stage, value in zip(stages, task["scores"], strict=True)
        )
        rows.append([name, *scores, forgot, str(task["rows"]), task["measure"]])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["every task after every stage; *: the stage that teaches it"]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for measure, means in chain["means"].items():
        known = (
            f"{label} {means[key]:{sign}.3f} ({short})"
            for key, (label, _, short, sign) in MEANS.items()
            if means[key] is not None
        )
        lines.append(f"mean {measure} {', '.join(known)}")
    return "\n".join(lines)


def _task(name: str, given: Mapping[str, Any], stages: Sequence[str]) -> Task:
    try:
        task = Task.model_validate(given)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False)
        where = ".".join(["tasks", name, *map(str, first["loc"])])
        raise ConfigError(f"{where}: {first['msg']}; expected {', '.join(Task.model_fields)}") from error
    learnt = task.learnt or name
    if learnt not in stages:
        raise ConfigError(
            f"tasks.{name}.learnt: {learnt} is none of models; expected one of {', '.join(stages)}, the "
            f"first for what is known before; type tasks.{name}.learnt={stages[-1]}"
        )
    return task.model_copy(update={"learnt": learnt})


def _verifier(name: str, task: Task, trusted: Iterable[str]) -> Callable[..., float] | None:
    if task.score is None:
        return None
    node = Target.model_validate({"_target_": task.score, "_partial_": True, **task.options})
    return targets.resolve(node, trusted, key=f"tasks.{name}.score", supplied=("answer", "row"))


def _right(name: str, score: Callable[..., float], answer: Completion, row: Mapping[str, Any]) -> bool:
    """Whether an answer ended by itself and is right. Raises ConfigError where it cannot be judged."""
    try:
        return answer.finished and score(answer.text, row) == 1.0
    except Exception as error:  # whatever a function of the user's raises
        raise ConfigError(
            f"tasks.{name}.score: {type(error).__name__} of {answer.text!r}: {error}; expected a function of "
            f"an answer and a row with {', '.join(row)}; type tasks.{name}.options or another score"
        ) from error


def _of(
    task: Task, stages: Sequence[str], answered: Sequence[Sequence[bool]], losses: Sequence[float]
) -> dict[str, Any]:
    """What is known of one task, by stage."""
    assert task.learnt is not None
    own = stages.index(task.learnt)
    about: dict[str, Any] = {"learnt": task.learnt}
    if losses:
        scores = [math.exp(-loss) for loss in losses]
        about |= {"measure": "likelihood", "scores": scores, "losses": list(losses)}
    else:
        shares = [share(sum(right), len(right) - sum(right)) for right in answered]
        scores = [each.value for each in shares]
        about |= {"measure": "accuracy", "scores": scores, "intervals": [list(each[1:]) for each in shares]}
        about["chance"] = task.chance
        since = {stages[0]: answered[0], task.learnt: answered[own]}
        about["flips"] = {
            stage: asdict(transfer.flips(before, answered[-1], chance=task.chance))
            for stage, before in since.items()
            if stage != stages[-1]
        }
    last = own == len(stages) - 1
    return {**about, "forgetting": None if last else transfer.forgetting([[s] for s in scores], 0)}


def _means(
    stages: Sequence[str], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """By measure: ACC, LA, BWT and mean forgetting of the tasks that are measured so and are taught."""
    means = {}
    taught = [task for task in found.values() if task["learnt"] != stages[0]]
    for measure in dict.fromkeys(task["measure"] for task in taught):
        alike = [task for task in taught if task["measure"] == measure]
        scores = list(zip(*(task["scores"] for task in alike), strict=True))
        learnt = [stages.index(task["learnt"]) for task in alike]
        means[measure] = asdict(transfer.summary(scores, learnt))
    return means
