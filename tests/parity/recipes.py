"""One small run of uneven chats, carried out by any strategy, and by plain transformers as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from framework.config.measured import measure, plain, whole
from framework.config.specimens import write_rows
from framework.strategy.world import connect

__all__ = ["measure", "overrides", "reference", "whole", "write_rows"]

BETA1 = 0.9


def overrides(model: Path, data: Path, cache: Path, **changes: Any) -> list[str]:
    """A command line in fp32 with everything small."""
    values = {
        "model.path": model,
        "data.train": f"[{{path: {data}}}]",
        "data.cache_dir": cache,
        "data.max_length": 128,
        "batch.sequences": 24,
        "batch.tokens_per_micro": 128,
        "precision": "fp32",
        "optim.lr": 1e-3,
        "optim.betas": f"[{BETA1}, 0.95]",
        "optim.max_grad_norm": "null",
        "schedule": "constant",
        "schedule.warmup_steps": 0,
        "steps": 20,
        "launch.device": "cpu",
        "run_dir": cache / "run",
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in values.items()]


def reference(arguments: list[str], *, steps: int) -> dict[str, Any]:
    """The same run by plain means, in this process."""
    return plain(connect("cpu", timeout_s=1, environment={}), arguments, steps=steps)
