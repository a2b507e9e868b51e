"""The cells of the certificate: stage, strategy, adapter, packing, accumulation, ranks, as command lines.

A cell knows what to type and nothing of how it is measured. Strategies and adapters are those that `conf/`
has, so a new one is certified without being named here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from framework.config.compose import CONF

STEPS = 10
VOWELS = "framework.rollout.rewards.regex, pattern: '[aeiou][a-z]'"
SPREAD = "framework.rollout.rewards.repetition_penalty, words: 1"
REWARDS = f"[{{_target_: {VOWELS}}}, {{_target_: {SPREAD}, weight: 0.5}}]"

STAGES: Mapping[str, Mapping[str, Any]] = {
    "sft": {"stage": "sft", "data": "turns"},
    "distill": {
        "stage": "distill",
        "data": "chats",
        "stage.top_k": 8,
        "stage.sft_share": 0.25,
        "optim.lr": 5e-3,
    },
    "gkd": {
        "stage": "distill",
        "loss": "jsd",
        "data": "chats",
        "stage.top_k": "null",
        "stage.own_share": 0.5,
        "rollout.temperature": 0.9,
        "optim.lr": 5e-3,
    },
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
"""By name: the overrides of a run on the files of `specimens`; `data` names one of them."""

WRITING = ("gkd", "ppo", "grpo", "on_policy")
"""Stages that learn from answers which they write themselves."""

STRATEGIES = tuple(sorted(path.stem for path in (CONF / "strategy").glob("*.yaml")))
ADAPTERS = tuple(sorted(path.stem for path in (CONF / "adapter").glob("*.yaml")))

COPIES: Mapping[str, Mapping[str, Any]] = {
    "hsdp": {"strategy.shard_size": 2},
    "zeropp": {
        "strategy.shard_size": 2,
        "strategy.quantized_weights": "false",
        "strategy.quantized_gradients": "false",
    },
}
"""Strategies that keep several copies, which takes four ranks. What rounds is off: it cannot agree."""

AXES = ("stage", "strategy", "adapter", "packing", "accumulation", "ranks")

OFFLOADED = {"zero3_offload": {"strategy.parameters": "cpu"}}


@dataclass(frozen=True)
class Cell:
    """One run of the certificate."""

    stage: str
    strategy: str
    adapter: str
    packing: bool
    accumulation: bool  # a step is cut into several micro-batches
    ranks: int
    precision: str = "fp32"

    def __str__(self) -> str:
        rows = "packed" if self.packing else "padded"
        cut = "cut" if self.accumulation else "whole"
        return f"{self.stage} {self.strategy} {self.adapter} {rows} {cut} x{self.ranks} {self.precision}"


def arguments(kind: str, place: Path, model: Path, **changes: Any) -> list[str]:
    """A command line of a small run in fp32; micro-batches are cut on every number of ranks.

    `place` is what `specimens.write` has filled. `changes` are overrides with `__` for dots.
    """
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
        "steps": STEPS,
        "rollout.max_new_tokens": 12,
        "reward.workers": 1,
        "launch.device": "cpu",
        "run_dir": place / "run",
    }
    values |= chosen | {name.replace("__", "."): value for name, value in changes.items()}
    if kind not in WRITING:
        values = {name: value for name, value in values.items() if not name.startswith("rollout")}
    return [f"{name}={value}" for name, value in values.items()]


def line(cell: Cell, place: Path, model: Path, *, device: str) -> list[str]:
    """What one types for `cell`."""
    changes: dict[str, Any] = {
        "strategy": cell.strategy,
        "adapter": cell.adapter,
        "data.packing": str(cell.packing).lower(),
        "precision": cell.precision,
        # Rounding of a gradient that is mere rounding itself makes a whole step of Adam at its usual 1e-8.
        "optim.eps": 1e-6,
        "launch.nproc": cell.ranks,
        "launch.device": device,
        **COPIES.get(cell.strategy, {}),
        **OFFLOADED.get(cell.strategy, {}),
    }
    if cell.adapter != "full":
        changes["optim.lr"] = 1e-2
    if not cell.accumulation:
        changes["batch.tokens_per_micro"] = 8192
    return arguments(cell.stage, place, model, **changes)


def reference(cell: Cell) -> Cell:
    """What `cell` is compared with: one process, nothing spread, nothing cut, nothing packed, fp32."""
    return Cell(cell.stage, "ddp", cell.adapter, packing=False, accumulation=False, ranks=1)


def every(
    *,
    stages: Collection[str] = tuple(STAGES),
    strategies: Collection[str] = STRATEGIES,
    adapters: Collection[str] = ADAPTERS,
    precision: str = "fp32",
) -> Iterator[Cell]:
    """All cells of a choice: both ways of packing and of cutting on two ranks (or the four that several
    copies take), and packed and cut ones on one and on four.

    One process trains replicated under every strategy but those that offload, so only these are asked.
    """
    for stage, strategy, adapter in product(stages, strategies, adapters):
        many = 4 if strategy in COPIES else 2
        for packing, accumulation in product((True, False), repeat=2):
            yield Cell(stage, strategy, adapter, packing, accumulation, many, precision)
        if strategy == "ddp" or strategy.endswith("offload"):
            yield Cell(stage, strategy, adapter, True, True, 1, precision)
        if many == 2:
            yield Cell(stage, strategy, adapter, True, True, 4, precision)


def half(cells: Collection[Cell]) -> list[Cell]:
    """Every second cell, such that any two values of different axes still meet.

    A cell is kept where its places on all axes add up to an even number: fixing two of them leaves the
    others free to make it so.
    """
    known = {axis: sorted({getattr(cell, axis) for cell in cells}) for axis in AXES}
    return [cell for cell in cells if sum(known[axis].index(getattr(cell, axis)) for axis in AXES) % 2 == 0]


def cover(cells: Collection[Cell], allowed: Callable[[Cell], bool] = lambda cell: True) -> list[Cell]:
    """A small choice of `cells` in which any two values of different axes meet that meet in an allowed one.

    Greedy: whatever brings most new pairs comes next, the first of equals.
    """
    left = {cell: _pairs(cell) for cell in cells if allowed(cell)}
    missing = set().union(*left.values()) if left else set()
    chosen = []
    while missing:
        best = max(left, key=lambda cell: len(left[cell] & missing))
        missing -= left.pop(best)
        chosen.append(best)
    return chosen


def _pairs(cell: Cell) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    values = [(axis, getattr(cell, axis)) for axis in AXES]
    return {(one, other) for number, one in enumerate(values) for other in values[:number]}
