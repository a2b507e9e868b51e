"""What it costs to watch what is forgotten, and to keep account of what is replayed.

    python benchmarks/watching.py                    # about five minutes on one core
    python benchmarks/watching.py --shapes small --rounds 1 --out /tmp/x.json

One run in four ways, which take turns in one process on one thread: `none` watches and replays nothing,
`watched` looks at the built-in text as every run does by default, `replayed` takes a tenth of its trained
tokens from a second file and leaves a buffer, `both` does both. All rows have one length, so every way trains
on as many tokens. Two measures, in CPU-seconds of the process: each way's seconds a trained token over those
of `none` in the same round, which is what a user would notice and is as noisy as the machine; and what was
spent inside the looks and inside the account (which row comes next, how many of each source there were), over
the rest of the same run, which is finer. What is spent once, however long a run is (the start model scored
twice, the buffer written), is told apart.

The larger a model is the less a look costs beside a step, so the larger shapes run `watched` alone.
`estimated` is the share of the run that its own event foretold, of these looks, and `took` what they took.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus import write_model as write_real
from side_by_side import HERE, SHAPES, machine, rotated, versions

LENGTH = 256  # tokens of every example
REPLAYED = 0.1
ROWS = 2000  # of each file


@dataclass(frozen=True)
class Shape:
    """A model, and a run of it that takes a minute at most."""

    sizes: dict[str, int]
    steps: int
    sequences: int
    arms: tuple[str, ...] = ("watched",)
    rounds: int = 1


EVERY = ("none", "watched", "replayed", "both")
SIZES = {
    # with the tokenizer of 400 tokens that tests train: 0.1 and 0.7 million parameters
    "small": Shape({"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}, 120, 32, EVERY, 2),
    "medium": Shape({"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}, 100, 64),
    "135m": Shape(SHAPES["135m"], 3, 8),  # and SmolLM2's tokenizer; too few steps for looks that are 1 %
}
ARMS: dict[str, list[str]] = {
    "none": ["retain=none", "replay.stratum_tokens=0"],
    "watched": ["replay.stratum_tokens=0"],
    "replayed": [
        "retain=none",
        "replay=fixed",
        "replay.sources=[{path: GENERAL}]",
        f"replay.fraction={REPLAYED}",
    ],
    "both": ["replay=fixed", "replay.sources=[{path: GENERAL}]", f"replay.fraction={REPLAYED}"],
}
LOOKS, ACCOUNT = ("looks",), ("stream", "facts")  # what is spent all along


def write_model(where: Path, shape: str) -> Path:
    """Random weights in fp32."""
    if shape == "135m":
        write_real(where, SIZES[shape].sizes)
        return where
    from framework.config import specimens

    heads = SIZES[shape].sizes["hidden_size"] // 64
    sizes = {**SIZES[shape].sizes, "num_attention_heads": heads, "num_key_value_heads": heads}
    return specimens.write_model(where, tied=True, **sizes)


def write_text(where: Path, name: str) -> None:
    """Rows long enough to be cut to LENGTH."""
    rows = ({"text": f"{name} {i} one two three four. " * 60} for i in range(ROWS))
    (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(shape: str, place: Path, run_dir: Path, arm: str) -> list[str]:
    """The command line of one run."""
    return [
        f"model.path={place / shape}", f"data.train=[{{path: {place}/task.jsonl}}]", "data.truncation=right",
        f"data.max_length={LENGTH}", f"data.cache_dir={place}/cache-{shape}", "data.workers=1",
        f"batch.sequences={SIZES[shape].sequences}", "batch.tokens_per_micro=4096",
        "optim.lr=1e-4", f"steps={SIZES[shape].steps}", "launch.device=cpu", "launch.threads=1",
        f"run_dir={run_dir}", "tracker.report=false", "tracker.console=none", "evaluate.every=null",
        "evaluate.samples=0", "checkpoint.every=null", "checkpoint.export=false",
        *(text.replace("GENERAL", f"{place}/general.jsonl") for text in ARMS[arm]),
    ]  # fmt: skip


class Clock:
    """CPU-seconds of this process by phase; what is spent in a phase inside another is that one's alone."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._inner = 0.0

    def during(self, phase: str, called: Callable[..., Any]) -> Callable[..., Any]:
        """`called`, all of it in `phase`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began, outer, self._inner = time.process_time(), self._inner, 0.0
            try:
                return called(*args, **kwargs)
            finally:
                spent = time.process_time() - began
                self.spent[phase] += spent - self._inner
                self._inner = outer + spent

        return timed


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """The parts of a run, by phase; all of the training loop that is none of the others is `loop`."""
    from unittest import mock

    from framework.config import leaving, work
    from framework.data import loader
    from framework.data.mixture import Mixture
    from framework.train.retain import Retention

    with (
        mock.patch.object(Retention, "begin", clock.during("start", Retention.begin)),
        mock.patch.object(Retention, "look", clock.during("looks", Retention.look)),
        mock.patch.object(Mixture, "picks", clock.during("stream", Mixture.picks)),
        mock.patch.object(loader, "_facts", clock.during("facts", loader._facts)),
        mock.patch.object(leaving, "leave", clock.during("leave", leaving.leave)),
        mock.patch.object(work, "train", clock.during("loop", work.train)),
    ):
        yield


def run(shape: str, place: Path, arm: str, *more: str) -> dict[str, Any]:
    """One run: seconds of its parts, tokens, and what it foretold of the cost of watching."""
    from framework.config import compose, work

    clock, run_dir = Clock(), place / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    with timed(clock):
        if work.work(compose.compose([*settings(shape, place, run_dir, arm), *more])) != 0:
            raise SystemExit(f"{shape} {arm} did not end well: see {run_dir}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    told = [line["message"] for line in lines if "retention is measured" in line.get("message", "")]
    return {
        "shape": shape,
        "arm": arm,
        "trained_tokens": json.loads((run_dir / "result.json").read_text())["trained_tokens"],
        "seconds": {name: round(seconds, 4) for name, seconds in clock.spent.items()},
        "looks": sum(line["kind"] == "retain" for line in lines),
        "told": told[0] if told else None,
    }


def spent(one: Mapping[str, Any], *phases: str) -> float:
    """Seconds of some phases."""
    return sum(one["seconds"].get(name, 0.0) for name in phases)


def rate(one: Mapping[str, Any]) -> float:
    """Seconds a trained token, with the looks and without what is spent once."""
    return spent(one, "loop", *LOOKS, *ACCOUNT) / one["trained_tokens"]


def estimated(one: Mapping[str, Any]) -> float:
    """What the run foretold of its looks. It counts one at the start, which is free, and two passes there."""
    found = re.search("about ([0-9.e-]+) of the computation", one["told"] or "")
    return float(found[1]) * (one["looks"] - 1) / (one["looks"] + 1) if found else 0.0


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By shape and arm: medians over rounds, and the range of what is noisy."""
    rows = []
    for shape, arm in dict.fromkeys((one["shape"], one["arm"]) for one in runs):
        here = [one for one in runs if one["shape"] == shape]
        mine = [one for one in here if one["arm"] == arm]
        base = {one["round"]: rate(one) for one in here if one["arm"] == "none"}
        ratios = [rate(one) / base[one["round"]] for one in mine if one["round"] in base]
        rows.append(
            {
                "shape": shape,
                "arm": arm,
                "rounds": len(mine),
                "tokens_per_cpu_s": _median(1 / rate(one) for one in mine),
                "over_none": [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None,
                "looks": mine[-1]["looks"],
                "estimated": _median(estimated(one) for one in mine),
                "took": _median(spent(one, *LOOKS) / spent(one, "loop", *ACCOUNT) for one in mine),
                "account": _median(spent(one, *ACCOUNT) / spent(one, "loop", *ACCOUNT) for one in mine),
                "start_s": _median(spent(one, "start") for one in mine),
                "buffer_s": _median(spent(one, "leave") for one in mine),
            }
        )
    return rows


def _median(values: Iterable[float]) -> float:
    return float(f"{statistics.median(values):.4g}")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """For people."""
    text = [
        "| | tokens per CPU-second | over `none` | looks | estimated | took | account | start | buffer |",
        "|---|" + "---|" * 8,
    ]
    for row in rows:
        over = "{:.3f} ({:.3f}, {:.3f})".format(*row["over_none"]) if row["over_none"] else ""
        text.append(
            f"| {row['shape']} {row['arm']} | {row['tokens_per_cpu_s']:.0f} | {over} | {row['looks']} | "
            f"{row['estimated']:.2%} | {row['took']:.2%} | {row['account']:.2%} | {row['start_s']:.2f} s | "
            f"{row['buffer_s']:.2f} s |"
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, help="of each shape; more give narrower ratios")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "watching.json")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for name in ("task", "general"):
            write_text(place, name)
        for shape in given.shapes:
            write_model(place / shape, shape)
            run(shape, place, SIZES[shape].arms[-1], "steps=1")  # what a process pays once is nobody's
            for number in range(given.rounds or SIZES[shape].rounds):
                for arm in rotated(list(SIZES[shape].arms), number):
                    runs.append({"round": number, **run(shape, place, arm)})
                    print(json.dumps(runs[-1]), flush=True)
    rows = table(runs)
    found = {"machine": machine(), "versions": versions(), "table": rows, "runs": runs}
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(rows), f"\nwritten to {given.out}", sep="\n")


if __name__ == "__main__":
    main()
