"""One small run of every stage that learns from judgements or a teacher, through the whole configuration."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import workers

WORDS = "one two three four five list story capital of France".split()
VOWELS = "framework.rollout.rewards.regex, pattern: '[aeiou][a-z]'"
SPREAD = "framework.rollout.rewards.repetition_penalty, words: 1"
REWARDS = f"[{{_target_: {VOWELS}}}, {{_target_: {SPREAD}, weight: 0.5}}]"

STAGES: dict[str, dict[str, Any]] = {
    "reward": {"stage": "reward", "data": "pairs"},
    "dpo": {"stage": "preference", "data": "pairs", "loss.beta": 0.5},
    "kto": {"stage": "preference", "data": "labelled", "loss": "kto", "loss.beta": 0.5},
    "ppo": {
        "stage": "ppo",
        "data": "prompts",
        "reward": "model",
        "stage.prompts": 24,
        "stage.epochs": 2,
        "stage.value_scale": 0.5,
        "stage.critic_lr_scale": 1.0,
        "stage.kl_target": 1.0,
        "stage.kl_horizon": 50,
        "rollout.temperature": 0.9,
    },
    "grpo": {
        "stage": "grpo",
        "data": "prompts",
        "reward.functions": REWARDS,
        "stage.prompts": 6,
        "stage.epochs": 2,
        "rollout.samples": 4,
    },
    "distill": {
        "stage": "distill",
        "data": "chats",
        "stage.top_k": 8,
        "stage.sft_share": 0.25,
        "optim.lr": 5e-3,
    },
    "on_policy": {
        "stage": "grpo",
        "data": "prompts",
        "stage.advantages": "teacher",
        "stage.averaging": "token",
        "reward.functions": REWARDS,  # reported, and not learnt from
        "stage.prompts": 24,
        "stage.epochs": 2,
        "rollout.samples": 1,
        "loss.kl": 0.0,
    },
}
"""By name: the overrides of a run; `data` names one of the files of `write`."""

OF_THE_RANKS = ("seconds", "tokens_per_s", "peak_memory_bytes", "micros", "packing_efficiency")
"""What a line says of how the work was spread."""


def write(place: Path, model: Path) -> Path:
    """Pairs, labelled answers, prompts and chats of very uneven length, a reward model and a teacher."""
    draw = random.Random(0)

    def say(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    rows: dict[str, list[dict[str, Any]]] = {"pairs": [], "labelled": [], "prompts": [], "chats": []}
    for row in range(60):
        prompt = [{"role": "user", "content": say(10)}]
        one, other = f"{say(3 if row % 3 else 16)}.", f"{say(6)}!"
        rows["pairs"].append({"prompt": prompt, "chosen": one, "rejected": other, "margin": row % 2 * 0.5})
        rows["labelled"].append(
            {"prompt": prompt, "completion": one if row % 2 else other, "label": bool(row % 2)}
        )
        rows["prompts"].append({"prompt": prompt})
        rows["chats"].append({"messages": [*prompt, {"role": "assistant", "content": one}]})
    for name, lines in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _write_judge(place / "judge", model)
    write_teacher(place / "teacher", model)
    return place


def write_teacher(place: Path, model: Path, *, more_rows: int = 0) -> Path:
    """A wider, shallower model of the same words with sharp opinions; `more_rows` stand for no token."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.from_pretrained(
        model, hidden_size=48, num_hidden_layers=2, initializer_range=0.2, tie_word_embeddings=False
    )
    config.vocab_size += more_rows
    LlamaForCausalLM(config).float().save_pretrained(place)
    AutoTokenizer.from_pretrained(model).save_pretrained(place)
    return place


def _write_judge(place: Path, model: Path) -> None:
    """A scorer of the policy's words, with weights of its own."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(model, num_labels=1)
    LlamaForSequenceClassification(config).float().save_pretrained(place)
    AutoTokenizer.from_pretrained(model).save_pretrained(place)


def arguments(kind: str, place: Path, model: Path, **changes: Any) -> list[str]:
    """A command line in fp32 with everything small; micro-batches are cut on every number of ranks."""
    chosen = dict(STAGES[kind])
    data = chosen.pop("data")
    if chosen.get("reward") == "model":
        chosen |= {"reward.model": place / "judge", "stage.critic": place / "judge"}
    if chosen["stage"] == "distill":
        chosen["stage.teacher"] = place / "teacher"
    if chosen.get("stage.advantages") == "teacher":
        chosen["stage.reference_path"] = place / "teacher"
    values = {
        "model.path": model,
        "data.train": f"[{{path: {place}/{data}.jsonl}}]",
        "data.cache_dir": place / "cache",
        "data.max_length": 96,
        "batch.sequences": 12,
        "batch.tokens_per_micro": 96,
        "precision": "fp32",
        "optim.lr": 1e-3,
        "schedule": "constant",
        "schedule.warmup_steps": 0,
        "steps": 10,
        "rollout.max_new_tokens": 12,
        "reward.workers": 1,
        "launch.device": "cpu",
        "run_dir": place / "run",
    }
    values |= chosen | {name.replace("__", "."): value for name, value in changes.items()}
    if chosen["stage"] not in ("ppo", "grpo"):
        values = {name: value for name, value in values.items() if not name.startswith("rollout")}
    return [f"{name}={value}" for name, value in values.items()]


def curve(world: Any, arguments: Sequence[str], *, steps: int) -> dict[str, Any]:
    """Losses and norms of every step; metrics and tokens of every rollout, without what is timed."""
    from framework.config import build, compose, judging, stages
    from framework.config.stage import ONLINE
    from framework.train.meter import Meter
    from framework.train.trainer import accumulate

    run = compose.compose(arguments)
    prepared = build.prepare(run)
    engine = build.build_engine(prepared, world)
    rollout = judging.build_rollout(prepared, world) if run.stage.name in ONLINE else None
    stage = stages.build_stage(prepared, world, engine, rollout)
    rate, meter = build.learning_rate(prepared), Meter(world)
    answer: dict[str, Any] = {"lines": [], "micros": [], "rollouts": [], "tokens": []}
    for step in range(steps):
        began = stage.resting
        terms = stage.next(step)
        if began and run.stage.name in ONLINE:
            answer["tokens"].append([c.ids for c in stage._experience.completions])
        answer["rollouts"] += [
            {name: value for name, value in metrics.items() if not name.startswith("seconds")}
            for kind, metrics in stage.reports()
            if kind == "rollout"
        ]
        answer["micros"].append(len(terms[0].micros))
        accumulate(engine, terms, seed=run.seed, step=step, meter=meter)
        norm = engine.step(lr=rate(step), max_grad_norm=run.optim.max_grad_norm)
        line = {name: value for name, value in meter.line().items() if name not in OF_THE_RANKS}
        answer["lines"].append(line | {"grad_norm": norm})
    return answer


def run(size: int, kind: str, place: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Ten steps on `size` ranks, which must agree among themselves."""
    line = arguments(kind, place, model, **changes)
    ranks = workers.run(size, curve, line, steps=10, timeout_s=180)
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]
