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

import workers

from framework.config import work as working
from framework.config.compose import compose
from framework.train import trainer


class Entry(NamedTuple):
    """One example of one optimizer step."""

    term: str  # "" or "replay"
    source: int  # number of its table
    tokens: tuple[int, ...]
    trained: float  # tokens that count


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

    with (
        mock.patch.object(trainer, "accumulate", recorded),
        mock.patch.object(working, "_join", return_value=world),  # which stays open for other tests
    ):
        assert working.work(compose(arguments)) == 0
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
