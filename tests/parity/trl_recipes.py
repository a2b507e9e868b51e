"""The same rows for TRL and for us: what both need to be asked so that losses can be compared.

TRL's defaults that change numbers are off: bf16, gradient checkpointing, shuffling, cut prompts. Texts begin
with the beginning-of-sequence token and answers end with the end-of-sequence token, so neither adds one.
Adam's eps is 1e-6 in both: at 1e-8 the first updates of entries whose gradient is mere rounding are of full
size, and two right programs drift apart by 3e-5 in five steps (by 1e-6 with 1e-6, alike on the first step).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import workers

STEPS, ROWS, LR, BETA = 5, 4, 2e-3, 0.3
BEGIN, END = "<|im_start|>", "<|im_end|>"
WORDS = "one two three four five list story capital of France".split()
OURS = {
    "batch.sequences": ROWS,
    "batch.tokens_per_micro": 256,
    "data.max_length": 256,
    "data.shuffle": "false",
    "precision": "fp32",
    "optim.lr": LR,
    "optim.betas": "[0.9, 0.999]",
    "optim.eps": 1e-6,
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": 1.0,
    "schedule": "constant",
    "schedule.warmup_steps": 0,
    "steps": STEPS,
    "launch.device": "cpu",
}
THEIRS: dict[str, Any] = {
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
}


def pairs(*, bare_prompts: bool = False) -> list[dict[str, str]]:
    """Pairs of uneven length, a step's after the other's; bare prompts are one token long."""
    draw = random.Random(0)

    def say(most: int) -> str:
        return "".join(f" {word}" for word in draw.choices(WORDS, k=draw.randint(1, most)))

    rows = []
    for _ in range(STEPS * ROWS):
        prompt = BEGIN if bare_prompts else f"{BEGIN}Reverse{say(6)}:"
        rows.append({"prompt": prompt, "chosen": say(9) + END, "rejected": say(9) + "." + END})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def line(model: Path, data: Path, **changes: Any) -> list[str]:
    """A command line with the numbers of `OURS`."""
    values = {
        "model.path": model,
        "data.train": f"[{{path: {data}}}]",
        "data.cache_dir": data.parent / "cache",
        "run_dir": data.parent / "run",
    }
    values |= OURS | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in values.items()]


def ours(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Losses and norms of five steps through the composed configuration, and the rows' tokens."""
    (found,) = workers.run(1, curve, line(model, data, **changes))
    return found


def curve(world: Any, arguments: list[str]) -> dict[str, Any]:
    import stage_recipes

    from framework.config import build, compose

    table = build.prepare(compose.compose(arguments)).tables[0]
    rows = [table.judged(row) for row in range(len(table))]
    found = stage_recipes.measure(world, arguments, steps=STEPS)
    return {
        "losses": [line["loss"] for line in found["lines"]],
        "norms": [line["grad_norm"] for line in found["lines"]],
        "tokens": [[row.prompt.tolist(), *(ids.tolist() for ids in row.ids)] for row in rows],
        "pairs": [row.pairs.tolist() for row in rows],
    }


class Theirs:
    """A TRL trainer that can be run again from the same weights."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.start = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def train(self) -> tuple[list[float], list[float]]:
        """(losses, norms) of five steps."""
        self.trainer.model.load_state_dict(self.start)
        self.trainer.optimizer = self.trainer.lr_scheduler = None
        self.trainer.train()
        lines = [line for line in self.trainer.state.log_history if "loss" in line]
        assert len(lines) == STEPS
        return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


def causal(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
