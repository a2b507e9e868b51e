"""What all benchmarks share: contenders take turns in fresh processes, medians, a table, a file of results.

A benchmark is a script with contenders and data sets of its own; `main` runs it. Every contender does the
same work with the same weights on one thread, in a process of its own; contenders take turns, in another
order each round, so that a busy machine is unfair to none.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the framework of this repository

from corpus import write_corpus, write_model  # noqa: E402
from trainers import Marks  # noqa: E402

SHAPES = {
    # SmolLM2-135M, and a small one whose 12 million parameters are nearly all embedding.
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    "tiny": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4},
}
OURS = "ours"  # the contender that the others are compared with
CHILD = "--one"  # how a script is started for one contender

Contender = Callable[[Path, Path, Marks], None]
"""(model directory, data file, marks to make): does the work once."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One script. Names are those of numbers in `Marks.report`; each is shown under its title."""

    script: str  # its __file__
    description: str
    title: str
    contenders: Mapping[str, Contender]
    data: Sequence[str]  # kinds of `corpus.write_corpus`
    examples: int
    rounds: int
    speed: tuple[str, str]  # (name, title): what is compared
    more: Mapping[str, str] = field(default_factory=dict)  # further names and titles
    phases: Mapping[str, str] = field(default_factory=dict)  # parts of the time, compared one by one
    counts: str = "rows of data; the first optimizer step is not counted"


def main(benchmark: Benchmark) -> None:
    """Run the benchmark, or one contender of it."""
    if sys.argv[1:2] == [CHILD]:
        name, model, data = sys.argv[2:]
        return _one(benchmark.contenders[name], Path(model), Path(data))
    name = Path(benchmark.script).stem
    parser = argparse.ArgumentParser(
        description=benchmark.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--data", nargs="+", default=list(benchmark.data), choices=benchmark.data)
    contenders = list(benchmark.contenders)
    parser.add_argument("--contenders", nargs="+", default=contenders, choices=contenders)
    parser.add_argument("--rounds", type=int, default=benchmark.rounds)
    parser.add_argument("--examples", type=int, default=benchmark.examples, help=benchmark.counts)
    parser.add_argument("--out", type=Path, default=HERE / f"results/{name}.json")
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
                        run = measure(benchmark.script, contender, where / shape, where / f"{kind}.jsonl")
                        runs.append({"shape": shape, "data": kind, "round": number, **run})
                        print(describe(benchmark, runs[-1]), flush=True)
    table = summary(benchmark, runs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "versions": versions(), "table": table, "runs": runs}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print_table(benchmark, table)
    print(f"written to {arguments.out}")


def _one(contender: Contender, model: Path, data: Path) -> None:
    """The child: prints a line of JSON."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    marks = Marks()
    contender(model, data, marks)
    print(json.dumps(marks.report()))


def measure(script: str, contender: str, model: Path, data: Path) -> dict[str, Any]:
    """One contender in a fresh process with one thread."""
    with tempfile.TemporaryDirectory(prefix="sapwood-benchmark-") as temporary:
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": temporary,  # nothing that an earlier process has computed
            "WANDB_MODE": "disabled",
        }
        command = [sys.executable, script, CHILD, contender, str(model), str(data)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-4000:]}")
    return {"contender": contender, **json.loads(done.stdout.splitlines()[-1])}


def rotated(names: list[str], by: int) -> list[str]:
    """The names, another one first in every round."""
    by %= len(names)
    return names[by:] + names[:by]


def describe(benchmark: Benchmark, run: dict[str, Any]) -> str:
    name, title = benchmark.speed
    return (
        f"{run['shape']:>5} {run['data']:>5} round {run['round']} {run['contender']:<22} "
        f"{run[name]:8.2f} {title}  {run['peak_gib']:.2f} GiB  "
        + (f"first loss {run['first_loss']:.3f}" if run["first_loss"] is not None else "")
    )


def summary(benchmark: Benchmark, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds, with their range, and ours relative to each."""
    table = []
    speed = benchmark.speed[0]
    for shape, data in dict.fromkeys((run["shape"], run["data"]) for run in runs):
        here = [run for run in runs if (run["shape"], run["data"]) == (shape, data)]
        rows: dict[str, dict[str, Any]] = {}
        for contender in dict.fromkeys(run["contender"] for run in here):
            mine = [run for run in here if run["contender"] == contender]

            def median(name: str, mine: list[dict[str, Any]] = mine) -> float:
                return statistics.median(run[name] for run in mine)

            speeds = [run[speed] for run in mine]
            rows[contender] = {
                "shape": shape,
                "data": data,
                "contender": contender,
                speed: median(speed),
                "slowest": min(speeds),
                "fastest": max(speeds),
                **{name: median(name) for name in (*benchmark.more, *benchmark.phases, "peak_gib")},
            }
        ours = rows.get(OURS)
        for row in rows.values() if ours else ():
            assert ours is not None
            row["ours_is_times_faster"] = ours[speed] / row[speed]
            row["ours_takes_of_memory"] = ours["peak_gib"] / row["peak_gib"]
            if benchmark.phases:
                row["ours_is_times_faster_in"] = {
                    name: row[name] / ours[name] if ours[name] else None for name in benchmark.phases
                }
        table += rows.values()
    return table


def print_table(benchmark: Benchmark, table: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    speed, title = benchmark.speed
    shown = Table(title=f"{benchmark.title}; medians", title_justify="left")
    for name in ("model", "data", "contender"):
        shown.add_column(name)
    for name in (title, "range", *benchmark.more.values(), *benchmark.phases.values()):
        shown.add_column(name, justify="right")
    for name in ("peak GiB", "ours is faster by", "ours takes"):
        shown.add_column(name, justify="right")
    for row in table:
        shown.add_row(
            row["shape"],
            row["data"],
            row["contender"],
            _number(row[speed]),
            f"{_number(row['slowest'])} to {_number(row['fastest'])}",
            *(_number(row[name]) for name in benchmark.more),
            *(_phase(row, name) for name in benchmark.phases),
            f"{row['peak_gib']:.2f}",
            f"{row['ours_is_times_faster']:.2f}x" if "ours_is_times_faster" in row else "",
            f"{row['ours_takes_of_memory']:.0%}" if "ours_takes_of_memory" in row else "",
        )
    Console(width=190 if benchmark.phases else 140).print(shown)


def _phase(row: dict[str, Any], name: str) -> str:
    """Seconds and, in brackets, by how much ours is faster."""
    times = row.get("ours_is_times_faster_in", {}).get(name)
    return _number(row[name]) + (f" ({times:.2f}x)" if times is not None else "")


def _number(value: float) -> str:
    """As many digits as a figure of this size deserves."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 20 else f"{value:.2f}"


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
