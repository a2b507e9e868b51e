"""One contender, one pass over one data set: prints a line of JSON. Started by benchmarks/sft.py.

python benchmarks/contenders.py CONTENDER MODEL_DIR DATA.jsonl
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEQUENCES = 8  # examples per optimizer step
PACKED_TOKENS = 2048  # TRL's packed row: about as many real tokens as eight examples have
LEARNING_RATE = 1e-5


@dataclass
class Marks:
    """CPU-seconds and tokens after each optimizer step; the first step, which warms up, is not counted."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # real ones of that step
    trained: list[int] = field(default_factory=list)
    first_loss: float = 0.0
    peak: int = 0  # KiB, at the last step

    def step(self, tokens: float, trained: float) -> None:
        self.seconds.append(time.process_time())
        self.tokens.append(int(tokens))
        self.trained.append(int(trained))
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def report(self) -> dict[str, Any]:
        seconds = self.seconds[-1] - self.seconds[0]
        return {
            "tokens_per_cpu_s": sum(self.tokens[1:]) / seconds,
            "trained_tokens_per_cpu_s": sum(self.trained[1:]) / seconds,
            "cpu_s": seconds,
            "steps": len(self.seconds),
            "tokens": sum(self.tokens),
            "trained_tokens": sum(self.trained),
            "first_loss": self.first_loss,
            "peak_gib": self.peak / 2**20,
        }


def ours(model: Path, data: Path, marks: Marks, *, tokens_per_micro: int) -> None:
    """What `python launch/train.py` does on one rank, without writing anything."""
    from framework.config import build, compose, stages
    from framework.strategy.world import connect
    from framework.train.trainer import train

    class Record:
        def log(self, kind: str, metrics: Mapping[str, Any], *, step: int) -> None:
            if kind == "train":
                marks.first_loss = marks.first_loss or metrics["loss"]
                marks.step(metrics["tokens"], metrics["trained_tokens"])

        def artifact(self, path: Path, *, kind: str) -> None: ...
        def close(self, status: str) -> None: ...

    class Nowhere:
        def save(self, *_: Any) -> Path:
            return Path()

    class Never:
        requested = False

    with tempfile.TemporaryDirectory() as temporary:
        run = compose.compose(
            [
                f"model.path={model}",
                f"data.train=[{{path: {data}}}]",
                f"data.train_on={'all' if data.stem == 'even' else 'assistant'}",
                f"data.cache_dir={temporary}/cache",
                f"run_dir={temporary}/run",
                f"batch.sequences={SEQUENCES}",
                f"batch.tokens_per_micro={tokens_per_micro}",
                f"optim.lr={LEARNING_RATE}",
                "data.workers=1",
                "launch.device=cpu",
                "launch.threads=1",
            ]
        )
        prepared = build.prepare(run)
        world = connect("cpu", timeout_s=60)
        engine = build.build_engine(prepared, world)
        train(
            stages.build_stage(prepared, world, engine),
            engine,
            build.plan(prepared),
            learning_rate=build.learning_rate(prepared),
            checkpoints=Nowhere(),
            tracker=Record(),
            stop=Never(),
        )
        world.close()


def trl(model: Path, data: Path, marks: Marks, *, best: bool) -> None:
    """SFTTrainer as it comes, or with the flags that are fastest for it here."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, Any] = {}
    if best:
        settings = {
            "packing": True,
            "max_length": PACKED_TOKENS,
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": torch.bfloat16},
        }
    with tempfile.TemporaryDirectory() as temporary:
        trainer = _timed(SFTTrainer, marks)(
            model=str(model),
            args=SFTConfig(**{**_common(temporary), "max_length": PACKED_TOKENS, **settings}),
            train_dataset=load_dataset("json", data_files=str(data), split="train", cache_dir=temporary),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        trainer.train()
        marks.first_loss = trainer.state.log_history[0]["loss"]


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
        trainer = _timed(Trainer, marks)(
            model=AutoModelForCausalLM.from_pretrained(model),
            args=TrainingArguments(
                **_common(temporary),
                bf16=True,
                train_sampling_strategy="group_by_length" if grouped else "random",
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        trainer.train()
        marks.first_loss = trainer.state.log_history[0]["loss"]


def _common(directory: str) -> dict[str, Any]:
    """What all trainers are told: the same step size, the same optimizer, nothing written."""
    return {
        "output_dir": directory,
        "per_device_train_batch_size": SEQUENCES,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _timed(trainer: Any, marks: Marks) -> Any:
    """The trainer, with a mark after every optimizer step and the tokens that went into it."""
    from transformers import TrainerCallback

    class Timed(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            counts = self.counts = [0, 0]

            class Mark(TrainerCallback):  # type: ignore[misc]
                def on_step_end(self, *_: Any, **__: Any) -> None:
                    marks.step(*counts)
                    counts[:] = [0, 0]

            self.add_callback(Mark())

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            real = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            self.counts[0] += real
            self.counts[1] += int((inputs["labels"][:, 1:] != -100).sum())
            return super().training_step(model, inputs, *args, **kwargs)

    return Timed


CONTENDERS: dict[str, Callable[[Path, Path, Marks], None]] = {
    "ours": lambda m, d, k: ours(m, d, k, tokens_per_micro=8192),  # as it comes
    "ours, small micro-batches": lambda m, d, k: ours(m, d, k, tokens_per_micro=2048),
    "trl, defaults": lambda m, d, k: trl(m, d, k, best=False),
    "trl, best flags": lambda m, d, k: trl(m, d, k, best=True),
    "transformers": lambda m, d, k: transformers(m, d, k, grouped=False),
    "transformers, grouped": lambda m, d, k: transformers(m, d, k, grouped=True),
}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    marks = Marks()
    CONTENDERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), marks)
    print(json.dumps(marks.report()))
