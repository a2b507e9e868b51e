"""The ledger of a run: which rows went through its forward and backward passes, as the loop saw them.

Kept beside what `launch/train.py` does on every rank, in processes of `workers`. Rows are told by their
tokens as they stand in the micro-batches, not by what the data stream says that it gave.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import joined
import workers

from framework.config import cells
from framework.config.specimens import write
from framework.train import trainer

STEPS, SEQUENCES, REHEARSED = 8, 8, 3
WEIGHTS = {"general": 2, "chat": 1}  # of rows of replay
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"replay": "budget", "replay.fraction": 0.45},
    "dpo": {"replay": "term", "replay.most": 10, "replay.sequences": REHEARSED},
    "ppo": {"replay": "term", "replay.most": 10, "replay.sequences": REHEARSED, "stage.prompts": SEQUENCES},
}
"""Runs that replay under a budget: SFT mixes it in by a share of trained tokens, DPO and PPO have it as a
term of its own, by a number of examples a step. All look at what is forgotten every other step and move the
share or the coefficient."""


class Entry(NamedTuple):
    """One example of one optimizer step."""

    term: str  # "" or "replay"
    source: int  # number of its table
    tokens: tuple[int, ...]
    trained: float  # tokens that count


def files(place: Path, model: Path) -> Path:
    """Data of all kinds in `place`, of which the text to imitate has many lengths and no two rows alike."""
    for name, count in {"task": 60, "general": 30, "chat": 11, "watched": 12}.items():
        rows = (
            {"prompt": f"{name} {'one ' * (i % 5)}{i}", "completion": f" {'two ' * (i * 3 % 7)}{i}"}
            for i in range(count)
        )
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write(place, model)


def line(kind: str, place: Path, model: Path, run_dir: Path, **changes: Any) -> list[str]:
    """What one types for such a run; `changes` as of `cells.arguments`."""
    replayed = ", ".join(f"{{path: {place}/{name}.jsonl, weight: {w}}}" for name, w in WEIGHTS.items())
    settings = {
        **KINDS[kind],
        "replay.sources": f"[{replayed}]",
        "replay.max_forgetting": 0.02,
        "evaluate.retention": f"[{{path: {place}/watched.jsonl}}]",
        "retain": "none",
        "retain.every": 2,
        "batch.sequences": SEQUENCES,
        "steps": STEPS,
        "checkpoint.export": "false",
        "tracker.every": 1,
        "tracker.console": "none",
        "tracker.report": "false",
        "run_dir": run_dir,
    }
    if kind == "sft":
        settings["data.train"] = f"[{{path: {place}/task.jsonl}}]"
    return cells.arguments(
        kind, place, model, **{name.replace(".", "__"): value for name, value in settings.items()} | changes
    )


def run(size: int, arguments: Sequence[str]) -> list[list[Entry]]:
    """A run on `size` ranks; what all of them together consumed in each step, in an order of its own."""
    ranks = workers.run(size, keep, arguments, timeout_s=180)
    return [sorted(entry for rank in step for entry in rank) for step in zip(*ranks, strict=True)]


def keep(world: Any, arguments: Sequence[str]) -> list[list[Entry]]:
    """What one rank consumed in each step."""
    steps: list[list[Entry]] = []
    accumulate = trainer.accumulate

    def recorded(engine: Any, terms: Any, **options: Any) -> None:
        steps.append(
            [entry for term in terms for batch in term.micros for entry in entries(term.name, batch)]
        )
        accumulate(engine, terms, **options)

    with mock.patch.object(trainer, "accumulate", recorded):
        joined.work(world, arguments)
    return steps


def entries(term: str, batch: Any) -> Iterator[Entry]:
    """The segments of a micro-batch, packed, padded or with prompts stored once; fills are nobody's."""
    row = batch.input_ids[0] if batch.places is None else batch.input_ids[0][batch.places]
    for segment, source in enumerate(batch.sources.tolist()):
        first, after = batch.boundaries[segment : segment + 2].tolist()
        tokens = row[first:after] if batch.packed else batch.input_ids[segment, : after - first]
        if source >= 0:
            counted = float(batch.weights[batch.segments == segment].sum())
            yield Entry(term, source, tuple(tokens.tolist()), counted)


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """What the run reported."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def state(run_dir: Path, step: int) -> dict[str, Any]:
    """What the checkpoint after `step` steps says of the data and of the controller."""
    manifest = json.loads((run_dir / f"checkpoints/step-{step:06d}/manifest.json").read_text())
    return manifest["state"]
