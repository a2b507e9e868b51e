"""Files to measure forgetting on, a kind of text each: rows of the user's, or written by the start model.

No row of them is in the files that are trained on. What a user's file has besides may be replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.config import drafts, making, selfmade
from framework.config.nodes import Source
from framework.config.schema import Run
from framework.config.written import lines, replace
from framework.data import reading
from framework.data.holdout import split
from framework.data.probing import STRATA
from framework.errors import DataError

OTHERS = "self"  # stratum of what the start model writes without being asked
SPARE = 1.25  # rows written for each that is wanted: some may be trained on already


@dataclass(frozen=True)
class Stratum:
    """One kind of text."""

    name: str
    rows: int
    path: Path
    rest: Path | None  # what else the source has, to be learnt from


def from_files(given: Mapping[str, str], out: Path, *, rows: int, against: Sequence[str]) -> list[Stratum]:
    """`rows` rows of each of the named files, and the rest of it beside them. Raises DataError."""
    taken = selfmade.texts([Source(path=path) for path in against])
    found = []
    for name, path in given.items():
        read = list(reading.records(drafts.as_source(Source(path=path))))
        measured, left = split([reading.said(record) for _, record in read], rows, without=taken)
        if not measured:
            raise DataError(
                f"all of its {len(read)} rows are trained on; expected some that are not", path=path
            )
        rest = out / f"{name}-rest.jsonl" if left else None
        if rest is not None:
            replace(rest, lines([read[place][0] for place in left]))
        found.append(_written(name, [read[place][0] for place in measured], out, rest))
    return found


def from_model(run: Run, out: Path, *, rows: int, against: Sequence[str]) -> list[Stratum]:
    """Up to `rows` rows of each kind in the words of the run's start model. Raises UserError.

    Its built-in requests are none of those that replay is made from, and other chance draws the answers.
    """
    order = selfmade.order_of(run).model_copy(update={"part": "probe"})
    description = making.inspect(order)
    kinds = [plan.kind for plan in drafts.plans(order, description)]
    strata = len(STRATA) if "topics" in kinds and order.synthesis.prompts is None else 1
    asked = order.synthesis.model_copy(update={"rows": int(SPARE * rows * strata * len(kinds))})
    made = selfmade.make(order.model_copy(update={"synthesis": asked}), description)
    taken = selfmade.texts([Source(path=path) for path in against])
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row, _ in reading.records(drafts.as_source(Source(path=str(made.path)))):
        by_name.setdefault(row.get("stratum", OTHERS), []).append(row)
    found = []
    for name, own in by_name.items():
        measured, _ = split([making.said(row) for row in own], rows, without=taken)
        if measured:
            found.append(_written(name, [own[place] for place in measured], out, None))
    if not found:
        raise DataError("all that the model wrote is trained on; type synthesis.seed=1 for other text")
    return found


def typed(strata: Sequence[Stratum]) -> str:
    """What a run is to be told, as a person would type it."""
    sources = ", ".join(f"{{path: {stratum.path}, name: {stratum.name}}}" for stratum in strata)
    return f"'evaluate.retention=[{sources}]'"


def _written(name: str, rows: Sequence[Mapping[str, Any]], out: Path, rest: Path | None) -> Stratum:
    path = out / f"{name}.jsonl"
    replace(path, lines(rows))
    return Stratum(name, len(rows), path, rest)
