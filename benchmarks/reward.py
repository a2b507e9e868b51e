"""Reward modelling side by side: ours and trl.RewardTrainer.

    python benchmarks/reward.py                  # everything; long, see the options
    python benchmarks/reward.py --shapes tiny --rounds 1 --examples 16 --out /tmp/x.json

The data sets are pairs whose prompts are 0.3, 1 and 3 times as long as their answers, lengths varied. Every
optimizer step takes eight pairs. Ours also with small micro-batches that are computed again, which takes
least memory. Best flags for TRL: weights in bf16, nothing computed twice, and small micro-batches, which
hold less padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trainers
from side_by_side import Benchmark, main
from trainers import SEQUENCES, Marks

PAIRS_AT_ONCE = 2  # a micro-batch of TRL's with best flags


def ours(model: Path, data: Path, marks: Marks, *, small: bool = False) -> None:
    """As it comes, or in little memory."""
    settings = ["stage=reward", f"batch.sequences={SEQUENCES}", *(trainers.LITTLE_MEMORY if small else ())]
    trainers.ours(model, data, marks, settings, counts=["pairs"])


def trl(model: Path, data: Path, marks: Marks, *, best: bool) -> None:
    """RewardTrainer as it comes, or with the flags that are fastest for it here."""
    from trl import RewardConfig, RewardTrainer

    settings: dict[str, Any] = {"max_length": None}
    if best:
        settings |= {
            "per_device_train_batch_size": PAIRS_AT_ONCE,
            "gradient_accumulation_steps": SEQUENCES // PAIRS_AT_ONCE,
            **trainers.unchecked_bf16(),
        }
    trainers.trl(RewardTrainer, RewardConfig, model, data, marks, settings, counts=counts)


def counts(inputs: Mapping[str, Any]) -> dict[str, int]:
    return {"pairs": len(inputs["input_ids"]) // 2}


if __name__ == "__main__":
    main(
        Benchmark(
            script=__file__,
            description=__doc__,
            title="pairs per CPU-second, one thread",
            contenders={
                "ours": ours,
                "ours, checkpointed": lambda m, d, k: ours(m, d, k, small=True),
                "trl, defaults": lambda m, d, k: trl(m, d, k, best=False),
                "trl, best flags": lambda m, d, k: trl(m, d, k, best=True),
            },
            data=("pairs-0.3", "pairs-1", "pairs-3"),
            examples=24,
            rounds=1,
            speed=("pairs_per_cpu_s", "pairs/CPU-s"),
        )
    )
