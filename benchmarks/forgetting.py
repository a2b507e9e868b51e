"""What each protection keeps and costs: a model learns one thing after another, in many ways and over seeds.

    python benchmarks/forgetting.py                    # a model of 150k parameters: half an hour
    python benchmarks/forgetting.py --world smollm --jobs 2     # SmolLM2-135M-Instruct: `make forgetting`
    python benchmarks/forgetting.py --arms none,replay-10 --seeds 0 --out /tmp/x.json
    python benchmarks/forgetting.py --world smollm --seeds '' --figure docs/forgetting.svg  # only draw

An arm is one way of learning the second thing, all from the start model of their seed; benchmarks/worlds says
what is learnt and which arms there are. Every arm takes one thread. What was run already is kept in the file
of results, so that a run that was stopped goes on. Prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from side_by_side import HERE, machine

from framework.data.cache import locked

RESULTS = {"letters": "forgetting.json", "smollm": "forgetting_smollm.json"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", default="letters", choices=RESULTS)
    parser.add_argument("--arms", default="", help="some of them, by comma")
    parser.add_argument("--seeds", default="0,1,2", help="by comma; '' runs nothing and shows what is there")
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time; one takes a core and 4 GiB")
    parser.add_argument("--out", type=Path, help="file of results; benchmarks/results has one of each world")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/forgetting"), help="where start models are kept"
    )
    parser.add_argument(
        "--figure", type=Path, help="also draw what is gained against what is kept (.svg; needs matplotlib)"
    )
    arguments = parser.parse_args()
    world = importlib.import_module(f"worlds.{arguments.world}")
    chosen = [name for name in arguments.arms.split(",") if name] or list(world.ARMS)
    if unknown := [name for name in chosen if name not in world.ARMS]:
        parser.error(f"--arms: {unknown[0]} is none of {', '.join(world.ARMS)}")
    seeds = [int(seed) for seed in arguments.seeds.split(",") if seed]
    out = arguments.out or HERE / "results" / RESULTS[arguments.world]
    found = json.loads(out.read_text()) if out.exists() else {"runs": []}
    done = {(run["arm"], run["seed"]) for run in found["runs"]}
    missing = [(arm, seed) for seed in seeds for arm in chosen if (arm, seed) not in done]
    place = (arguments.runs / arguments.world).absolute()
    place.mkdir(parents=True, exist_ok=True)
    problems = []
    for run in measured(arguments.world, place, missing, arguments.jobs):
        if isinstance(run, BaseException):
            problems.append(run)
            print(f"failed: {run}", file=sys.stderr, flush=True)
            continue
        found["runs"].append(run)
        print(json.dumps(run), flush=True)
        order = list(world.ARMS)
        found["runs"].sort(key=lambda run: (run["seed"], order.index(run["arm"])))
        found |= {
            "machine": machine(),
            "versions": versions(world.PACKAGES),
            "table": table(found["runs"], world),
        }
        written = out.with_name(out.name + ".tmp")
        written.write_text(json.dumps(found, indent=1) + "\n")
        written.replace(out)
    rows = table(found["runs"], world)
    print(markdown(rows, world.SHOWN))
    if arguments.figure and rows:
        from worlds.picture import draw

        draw(arguments.figure, rows, gained=world.GAINED, kept=world.KEPT)
    if problems:
        raise SystemExit(f"{len(problems)} failed; the same command tries them again") from problems[0]


def measured(world: str, place: Path, missing: Sequence[tuple[str, int]], jobs: int) -> Any:
    """Each missing run of (arm, seed) once it is done, `jobs` at a time in processes of their own; or what
    has kept it from being done."""
    if not missing:
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        seeds = dict.fromkeys(seed for _, seed in missing)
        starts = [pool.submit(start, world, place, seed) for seed in seeds]
        arms = [pool.submit(run, world, place, arm, seed) for arm, seed in missing]
        try:
            for finished in as_completed([*starts, *arms]):
                problem = finished.exception()
                if problem is not None or finished in arms:
                    yield problem or finished.result()
        except BaseException:  # what has not begun never does
            pool.shutdown(cancel_futures=True)
            raise


def start(world: str, place: Path, seed: int) -> None:
    """Make the start model of a seed, where it is not there. In a process of its own."""
    prepared(world, place, seed)


def run(world: str, place: Path, arm: str, seed: int) -> dict[str, Any]:
    """One arm and what it took. In a process of its own."""
    ready = prepared(world, place, seed)
    began, used = time.monotonic(), cpu_seconds()
    numbers = ready.arm(arm)
    spent = {"cpu_seconds": cpu_seconds() - used, "seconds": time.monotonic() - began}
    return {"arm": arm, "seed": seed, **numbers, **spent}


def prepared(world: str, place: Path, seed: int) -> Any:
    """The world of a seed with all that its arms begin with."""
    import torch

    torch.set_num_threads(1)
    made = importlib.import_module(f"worlds.{world}").World(place, seed)
    with locked(place / f"seed-{seed}.lock"):
        made.prepare()
    return made


def versions(packages: Sequence[str]) -> dict[str, str]:
    """What the numbers were taken with."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def table(runs: Sequence[Mapping[str, Any]], world: Any) -> list[dict[str, Any]]:
    """By arm: mean and standard deviation over seeds of each number, and the verdicts."""
    rows, found = [], world.derived(runs)
    for arm in (name for name in world.ARMS if any(run["arm"] == name for run in found)):
        own = [run for run in found if run["arm"] == arm]
        verdicts = [run.get("verdict") for run in own]
        row: dict[str, Any] = {"arm": arm, "seeds": len(own), "verdicts": verdicts}
        for name in world.SHOWN:
            values = [run[name] for run in own if run.get(name) is not None]
            if values:
                row[name] = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> str:
    """The table for people: mean and, behind it, standard deviation."""

    def cell(row: Mapping[str, Any], name: str) -> str:
        if name not in row:
            return ""
        return f"{row[name][0]:.3g}" + (f" ± {row[name][1]:.2g}" if row["seeds"] > 1 else "")

    titles = [name.replace("_", " ") for name in shown]
    lines = ["| arm | " + " | ".join(titles) + " | verdicts |", "|---" * (len(shown) + 2) + "|"]
    for row in rows:
        verdicts = ", ".join(dict.fromkeys(str(verdict) for verdict in row["verdicts"] if verdict))
        lines.append(
            f"| {row['arm']} | " + " | ".join(cell(row, name) for name in shown) + f" | {verdicts} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
