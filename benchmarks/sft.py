"""Supervised fine-tuning side by side: ours, trl.SFTTrainer and transformers.Trainer.

    python benchmarks/sft.py                     # everything; long, see the options
    python benchmarks/sft.py --shapes tiny --rounds 1 --examples 32 --out /tmp/x.json

Counted are *useful* tokens (real ones, never padding) per CPU-second after the first step, and peak resident
memory. The data sets: `chat`, answers trained, lengths as varied as chats are; `even`, where packing and
masking can win nothing: all examples of one length, all tokens trained.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trainers
from side_by_side import Benchmark, main
from trainers import SEQUENCES, Marks

PACKED_TOKENS = 2048  # TRL's packed row: about as many real tokens as eight examples have


def ours(model: Path, data: Path, marks: Marks, *, tokens_per_micro: int, recompute: str = "none") -> None:
    """As it comes, but for the size of a micro-batch and what is computed again."""
    settings = [
        f"data.train_on={'all' if data.stem == 'even' else 'assistant'}",
        f"batch.sequences={SEQUENCES}",
        f"batch.tokens_per_micro={tokens_per_micro}",
        f"model.activation_checkpointing={recompute}",
    ]
    trainers.ours(model, data, marks, settings, counts=["tokens", "trained_tokens"])


def trl(model: Path, data: Path, marks: Marks, *, best: bool) -> None:
    """SFTTrainer as it comes, or with the flags that are fastest for it here."""
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, Any] = {"max_length": PACKED_TOKENS}
    if best:
        settings |= {"packing": True, "per_device_train_batch_size": 1, **trainers.unchecked_bf16()}
    trainers.trl(SFTTrainer, SFTConfig, model, data, marks, settings, counts=counts)


def transformers(model: Path, data: Path, marks: Marks, *, grouped: bool) -> None:
    """The plain Trainer: bf16 autocast over fp32 weights, padded batches, labels on trained tokens only."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        if "text" in row:
            ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
            return {"input_ids": ids, "labels": ids}
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=False)
        return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}

    rows = [encode(json.loads(line)) for line in data.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as temporary:
        trainer = trainers.timed(Trainer, marks, counts)(
            model=AutoModelForCausalLM.from_pretrained(model),
            args=TrainingArguments(
                **trainers.common(temporary),
                bf16=True,
                train_sampling_strategy="group_by_length" if grouped else "random",
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        trainer.train()
        marks.first_loss = trainer.state.log_history[0]["loss"]


def counts(inputs: Mapping[str, Any]) -> dict[str, int]:
    mask = inputs.get("attention_mask")
    return {
        "tokens": inputs["input_ids"].numel() if mask is None else int(mask.sum()),
        "trained_tokens": int((inputs["labels"][:, 1:] != -100).sum()),
    }


if __name__ == "__main__":
    main(
        Benchmark(
            script=__file__,
            description=__doc__,
            title="useful tokens per CPU-second, one thread",
            contenders={
                "ours": lambda m, d, k: ours(m, d, k, tokens_per_micro=8192),  # as it comes
                "ours, small micro-batches": lambda m, d, k: ours(m, d, k, tokens_per_micro=2048),
                "ours, checkpointed": lambda m, d, k: ours(m, d, k, tokens_per_micro=2048, recompute="full"),
                "trl, defaults": lambda m, d, k: trl(m, d, k, best=False),
                "trl, best flags": lambda m, d, k: trl(m, d, k, best=True),
                "transformers": lambda m, d, k: transformers(m, d, k, grouped=False),
                "transformers, grouped": lambda m, d, k: transformers(m, d, k, grouped=True),
            },
            data=("chat", "even"),
            examples=64,
            rounds=3,
            speed=("tokens_per_cpu_s", "tokens/CPU-s"),
            more={"trained_tokens_per_cpu_s": "trained/CPU-s"},
        )
    )
