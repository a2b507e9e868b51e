"""Direct preference optimisation side by side: ours and trl.DPOTrainer, the reference model's work included.

    python benchmarks/dpo.py                     # everything; long, see the options
    python benchmarks/dpo.py --shapes tiny --rounds 1 --examples 16 --out /tmp/x.json

The data sets are pairs whose prompts are 0.3, 1 and 3 times as long as their answers, lengths varied. Every
optimizer step takes eight pairs. Pairs per CPU-second are those of one pass over the data, in which each is
seen by policy and reference; where the reference's answers are computed once and kept, "again" says what
every further pass runs at. Ours also with small micro-batches of which every other block is computed again:
half the memory. Best flags for TRL: such answers kept, weights in bf16, nothing computed twice, and small
micro-batches, which hold less padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trainers
from side_by_side import Benchmark, main
from trainers import SEQUENCES, Marks

PAIRS_AT_ONCE = 2  # a micro-batch of TRL's with best flags
HALF_AGAIN = ("model.activation_checkpointing=selective", "batch.tokens_per_micro=2048")


def ours(model: Path, data: Path, marks: Marks, *, reference: str, small: bool = False) -> None:
    """As it comes (a frozen copy answers for the start), with its answers kept, or in half the memory."""
    marks.before = 0.0
    settings = ["stage=preference", f"stage.reference={reference}", f"batch.sequences={SEQUENCES}"]
    settings += HALF_AGAIN if small else ()
    trainers.ours(model, data, marks, settings, counts=["pairs"], building=reference == "cached")


def trl(model: Path, data: Path, marks: Marks, *, best: bool) -> None:
    """DPOTrainer as it comes, or with the flags that are fastest for it here."""
    from trl import DPOConfig, DPOTrainer

    marks.before = 0.0

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            began = trainers.cpu_seconds()
            found = super()._precompute_ref_logps(*args, **kwargs)
            marks.before = trainers.cpu_seconds() - began
            return found

    settings: dict[str, Any] = {"max_length": None}
    if best:
        settings |= {
            "precompute_ref_log_probs": True,
            "per_device_train_batch_size": PAIRS_AT_ONCE,
            "gradient_accumulation_steps": SEQUENCES // PAIRS_AT_ONCE,
            **trainers.unchecked_bf16(),
        }
    trainers.trl(Trainer, DPOConfig, model, data, marks, settings, counts=counts)


def counts(inputs: Mapping[str, Any]) -> dict[str, int]:
    return {"pairs": len(inputs["input_ids"]) // 2}


if __name__ == "__main__":
    main(
        Benchmark(
            script=__file__,
            description=__doc__,
            title="pairs per CPU-second, one thread",
            contenders={
                "ours": lambda m, d, k: ours(m, d, k, reference="auto"),
                "ours, reference kept": lambda m, d, k: ours(m, d, k, reference="cached"),
                "ours, half checkpointed": lambda m, d, k: ours(m, d, k, reference="cached", small=True),
                "trl, defaults": lambda m, d, k: trl(m, d, k, best=False),
                "trl, best flags": lambda m, d, k: trl(m, d, k, best=True),
            },
            data=("pairs-0.3", "pairs-1", "pairs-3"),
            examples=24,
            rounds=1,
            speed=("pairs_per_cpu_s", "pairs/CPU-s"),
            more={"pairs_per_cpu_s_again": "again"},
        )
    )
