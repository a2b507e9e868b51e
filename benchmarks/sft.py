"""Supervised fine-tuning side by side: ours, trl.SFTTrainer and transformers.Trainer.

    python benchmarks/sft.py                     # everything, about half an hour on one quiet core
    python benchmarks/sft.py --shapes tiny --rounds 1 --examples 32 --out /tmp/x.json

Every contender goes once through the same examples with the same weights, one thread, in a process of its
own; contenders take turns, in another order each round, so that a busy machine is unfair to none. Counted are
*useful* tokens (real ones, never padding) per CPU-second after the first step, and peak resident memory.
The data sets: `chat`, answers trained, lengths as varied as chats are; `even`, where packing and masking can
win nothing: all examples of one length, all tokens trained.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the framework of this repository

from contenders import CONTENDERS
from corpus import write_corpus, write_model

HERE = Path(__file__).resolve().parent
SHAPES = {
    # SmolLM2-135M, and a small one whose 12 million parameters are nearly all embedding.
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    "tiny": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--data", nargs="+", default=["chat", "even"], choices=["chat", "even"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=HERE / "results/sft.json")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sapwood-benchmark-") as temporary:
        where = Path(temporary)
        for kind in arguments.data:
            write_corpus(where / f"{kind}.jsonl", kind, examples=arguments.examples)
        for shape in arguments.shapes:
            write_model(where / shape, SHAPES[shape])
            for kind in arguments.data:
                for number in range(arguments.rounds):
                    for contender in rotated(arguments.contenders, number):
                        run = measure(contender, where / shape, where / f"{kind}.jsonl")
                        runs.append({"shape": shape, "data": kind, "round": number, **run})
                        print(describe(runs[-1]), flush=True)
    table = summary(runs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "versions": versions(), "table": table, "runs": runs}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print_table(table)
    print(f"written to {arguments.out}")


def measure(contender: str, model: Path, data: Path) -> dict[str, Any]:
    """One contender in a fresh process with one thread."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    command = [sys.executable, str(HERE / "contenders.py"), contender, str(model), str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-4000:]}")
    return {"contender": contender, **json.loads(done.stdout.splitlines()[-1])}


def rotated(names: list[str], by: int) -> list[str]:
    """The names, another one first in every round."""
    by %= len(names)
    return names[by:] + names[:by]


def describe(run: dict[str, Any]) -> str:
    return (
        f"{run['shape']:>5} {run['data']:>5} round {run['round']} {run['contender']:<22} "
        f"{run['tokens_per_cpu_s']:8.1f} tokens/CPU-s  {run['peak_gib']:.2f} GiB  "
        f"first loss {run['first_loss']:.3f}"
    )


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds, with their range, and ours relative to each."""
    table = []
    for shape, data in dict.fromkeys((run["shape"], run["data"]) for run in runs):
        here = [run for run in runs if (run["shape"], run["data"]) == (shape, data)]
        rows = {}
        for contender in dict.fromkeys(run["contender"] for run in here):
            mine = [run for run in here if run["contender"] == contender]
            speeds = [run["tokens_per_cpu_s"] for run in mine]
            rows[contender] = {
                "shape": shape,
                "data": data,
                "contender": contender,
                "tokens_per_cpu_s": statistics.median(speeds),
                "slowest": min(speeds),
                "fastest": max(speeds),
                "trained_tokens_per_cpu_s": statistics.median(
                    run["trained_tokens_per_cpu_s"] for run in mine
                ),
                "peak_gib": statistics.median(run["peak_gib"] for run in mine),
            }
        ours = rows.get("ours")
        for row in rows.values():
            if ours:
                row["ours_is_times_faster"] = ours["tokens_per_cpu_s"] / row["tokens_per_cpu_s"]
                row["ours_takes_of_memory"] = ours["peak_gib"] / row["peak_gib"]
        table += rows.values()
    return table


def print_table(table: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="useful tokens per CPU-second, one thread; medians", title_justify="left")
    for name in ("model", "data", "contender"):
        shown.add_column(name)
    for name in ("tokens/CPU-s", "range", "trained/CPU-s", "peak GiB", "ours is faster by", "ours takes"):
        shown.add_column(name, justify="right")
    for row in table:
        shown.add_row(
            row["shape"],
            row["data"],
            row["contender"],
            f"{row['tokens_per_cpu_s']:.1f}",
            f"{row['slowest']:.0f} to {row['fastest']:.0f}",
            f"{row['trained_tokens_per_cpu_s']:.1f}",
            f"{row['peak_gib']:.2f}",
            f"{row['ours_is_times_faster']:.2f}x" if "ours_is_times_faster" in row else "",
            f"{row['ours_takes_of_memory']:.0%}" if "ours_takes_of_memory" in row else "",
        )
    Console(width=140).print(shown)


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {"cpu": model, "cores": os.cpu_count(), "threads_used": 1, "system": platform.platform()}


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


if __name__ == "__main__":
    main()
