"""How well `launch/plan.py` foresees memory: predicted and measured peaks of real runs on a CPU.

    python benchmarks/plan.py                      # 16 runs of two ranks, about half an hour on two cores
    python benchmarks/plan.py --shapes tiny --out /tmp/x.json

Models are new and random: `tiny` (60 thousand parameters) and `135m` (the shape of SmolLM2-135M with a small
tokenizer). Each run takes three steps of packed examples of one length, so that moments and gradients exist,
and measured is the largest resident set of its ranks, from its own train lines. What is resident beside
tensors (interpreter, libraries) is taken from the first tiny run, which has next to no tensors, and is the
same number in all others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MIB = 2**20
LENGTH = 512  # tokens of every example
SHAPES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}  # fmt: skip
RUNS = (
    ["strategy=ddp"],
    ["strategy=ddp", "model.activation_checkpointing=full"],
    ["strategy=ddp", "precision=fp32"],
    ["strategy=ddp", "adapter=lora"],
    ["strategy=fsdp"],
    ["strategy=fsdp", "model.activation_checkpointing=full"],
    ["strategy=fsdp", "precision=fp32"],
    ["strategy=fsdp", "adapter=lora"],
)


def write_model(where: Path, shape: str) -> Path:
    """A configuration and a tokenizer; no weights, which `model.init=random` makes."""
    import tiny
    from transformers import LlamaConfig

    words = tiny.tokenizer()
    known = {"vocab_size": len(words), "max_position_embeddings": 2048} | SHAPES[shape]
    config = LlamaConfig(**known, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(where)
    words.save_pretrained(where)
    return where


def write_text(where: Path) -> Path:
    """Rows long enough to be cut to LENGTH."""
    rows = ({"text": f"{i} one two three four. " * 400} for i in range(32))
    where.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where


def settings(model: Path, data: Path, run_dir: Path, changes: list[str]) -> list[str]:
    """The command line of one run: two ranks, a micro-batch of 1024 tokens each a step."""
    return [
        f"model.path={model}", "model.init=random", f"data.train=[{{path: {data}}}]", "data.truncation=right",
        f"data.max_length={LENGTH}", f"data.cache_dir={run_dir.parent}/cache", "batch.sequences=4",
        "batch.tokens_per_micro=1024", "steps=3", "launch.nproc=2", "launch.device=cpu", "launch.threads=1",
        f"run_dir={run_dir}", "tracker.every=1", "tracker.report=false", "tracker.console=none",
        "retain=none", "evaluate.every=null", "checkpoint.every=null", "checkpoint.export=false", *changes,
    ]  # fmt: skip


def measured(overrides: list[str], run_dir: Path) -> int:
    """Bytes resident at most in the largest rank, before the last checkpoint."""
    line = [sys.executable, str(ROOT / "launch" / "train.py"), *overrides]
    subprocess.run(line, check=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return max(int(line["peak_memory_bytes"]) for line in lines if line["kind"] == "train")


def predicted(overrides: list[str]) -> dict[str, Any]:
    """Bytes of tensors, by what they are for, and the moment of most."""
    import torch

    from framework.config import outlines, plan
    from framework.config.compose import compose

    found = plan.plan(outlines.outlined(compose(overrides)), torch.device("cpu"), saving=False)
    tensors = {name: size for name, size in found.memory.items() if name != "beside tensors"}
    told = found.memory["beside tensors"]  # what launch/plan.py reckons with
    return {"tensors": sum(tensors.values()), "phase": found.phase, "by": tensors, "told_apart": told}


def rows(shapes: list[str], place: Path) -> Iterator[dict[str, Any]]:
    data = write_text(place / "rows.jsonl")
    apart = None
    for shape in shapes if shapes[0] == "tiny" else ["tiny", *shapes]:
        model = write_model(place / shape, shape)
        for number, changes in enumerate(RUNS):
            run_dir = place / f"{shape}-{number}"
            overrides = settings(model, data, run_dir, changes)
            ahead, found = predicted(overrides), measured(overrides, run_dir)
            apart = found - ahead["tensors"] if apart is None else apart
            row = {"shape": shape, "settings": changes, **ahead, "apart": apart, "measured": found}
            row["error"] = round((ahead["tensors"] + apart) / found - 1, 4)
            row["error_as_told"] = round((ahead["tensors"] + ahead["told_apart"]) / found - 1, 4)
            row["tensors_error"] = (
                round(ahead["tensors"] / (found - apart) - 1, 4) if shape != "tiny" else None
            )
            print(
                f"{shape:5} {' '.join(changes):60} predicted {(ahead['tensors'] + apart) / MIB:7.0f} MiB  "
                f"measured {found / MIB:7.0f} MiB  {row['error']:+.1%}  ({ahead['phase']})",
                flush=True,
            )
            yield row


def machine() -> str:
    """Processor and versions, for whoever compares."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{', '.join(sorted(names))}, {os.cpu_count()} cores, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan.json")
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as place:
        for row in rows(given.shapes, Path(place)):
            found.append(row)  # and written at once: a run that is stopped keeps what it has
            given.out.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")
    print(f"in {given.out}")


if __name__ == "__main__":
    main()
