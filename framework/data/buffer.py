"""What training leaves for later stages to rehearse: some rows of each of its sources, with their origin.

    data.train, replay.sources     what a stage learns from
        │ order       every row has a random place: a pure function of (seed, stratum, row)
        │             `surprising`: of the first so many, what the start model finds least likely first
        │ rehearsed   as text to imitate: of judged answers the best, of questions those with their answer
    RUN/buffer/                    in that order, up to twice the budget of tokens
        <hash>.jsonl               one stratum, named by its content
        manifest.json              strata of the stages before, then its own; what is excluded; its parent
        │ draw        the first rows that nobody has excluded, up to the budget
    replay.sources                 of a later stage, and from there files like any other: tokenised, looked
                                   through for probes, mixed to the example, part of the run's fingerprint

A random place depends on no other row, so this is a reservoir (a uniform sample without replacement, as
Vitter's algorithm R gives). From either order a row can be taken: the next one moves up, and no other row
changes. A smaller budget keeps a part of what a larger one keeps. Knows no model, run or configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from framework import keyed
from framework.data.cache import fingerprint
from framework.errors import DataError

FORMAT = 1  # of the manifest; another number is refused
MANIFEST = "manifest.json"
RESERVE = 2  # budgets of tokens that are kept, one of them to fill up from
COMPARED = 4  # times as many tokens as are kept are compared where it matters which they are
ODD = 100  # of so many rows the least likely one is rather damaged than new
DIGITS = 3  # of a loss in nats that do not depend on the cut into micro-batches
HASH = re.compile(r"[0-9a-f]{32}")  # of a row, a source or a shard: xxh3-128

Line = Mapping[str, Any]
"""A row to imitate (prompt and completion, or text; tools); `row` its hash, `from` its place, `tokens`."""


@dataclass(frozen=True)
class Stratum:
    """The rows of one source of one stage."""

    name: str  # as in metrics
    stage: str  # that learnt it: sft, preference, ...
    path: str  # as its run was given it
    source: str  # hash of the content of its files
    licence: str | None  # as its run was given it
    added: str  # when: UTC, ISO 8601
    format: str  # of its lines: prompt_completion or text
    rows: int
    tokens: int  # of all rows, as its run tokenised them
    shard: str  # hash of its lines, whose file is named after it


@dataclass(frozen=True)
class Buffer:
    """What a run leaves: strata, oldest first, and rows or sources that must not be drawn."""

    strata: tuple[Stratum, ...] = ()
    excluded: tuple[str, ...] = ()  # hashes of rows; hashes and names of sources
    parent: str | None = None  # identity of the buffer it grew from

    @property
    def identity(self) -> str:
        """Equal rows in equal strata, grown in the same way; when and where from does not count."""
        strata = [(stratum.name, stratum.shard) for stratum in self.strata]
        return fingerprint({"strata": strata, "excluded": self.excluded, "parent": self.parent})

    def encode(self) -> bytes:
        """The manifest: JSON for people and programs, with a hash of itself."""
        body = {
            "format": FORMAT,
            "identity": self.identity,
            "parent": self.parent,
            "excluded": list(self.excluded),
            "strata": [asdict(stratum) for stratum in self.strata],
        }
        return (json.dumps({**body, "seal": fingerprint(body)}, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes) -> Buffer:
        """Raises ValueError saying what is wrong with `raw`."""
        try:
            body = json.loads(raw)
            if body.pop("seal") != fingerprint(body):
                raise ValueError("its content does not match its seal")
            if body["format"] != FORMAT:
                raise ValueError(f"it is of format {body['format']!r}; this program reads {FORMAT}")
            strata = tuple(Stratum(**stratum) for stratum in body["strata"])
            if strange := [s.shard for s in strata if not HASH.fullmatch(s.shard)]:
                raise ValueError(f"it names a file {strange[0]!r}, which is no hash")
            return cls(strata, tuple(body["excluded"]), body["parent"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is not laid out as format {FORMAT}: {error!r}") from error


def read(directory: Path) -> Buffer:
    """The buffer in `directory`, every file of it verified. Raises DataError for one that is damaged."""
    try:
        buffer = Buffer.decode((directory / MANIFEST).read_bytes())
        for stratum in buffer.strata:
            if content_hash((directory / f"{stratum.shard}.jsonl").read_bytes()) != stratum.shard:
                raise ValueError(f"{stratum.shard}.jsonl ({stratum.name}) is not as it was written")
    except (OSError, ValueError) as error:
        raise DataError(
            f"a buffer of earlier stages that cannot be used: {error}; expected it as its run has left it; "
            "restore it, or remove the directory to go on without",
            path=directory,
        ) from error
    return buffer


def lines(directory: Path, stratum: Stratum) -> list[Line]:
    """The rows of a stratum in their order."""
    text = (directory / f"{stratum.shard}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def encoded(rows: Sequence[Line]) -> bytes:
    """The content of a shard."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(
        "utf-8", "surrogatepass"
    )


def content_hash(raw: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(raw)


def measures(rows: Sequence[Line]) -> dict[str, Any]:
    """What a stratum says of its rows."""
    return {
        "format": "text" if any("text" in row for row in rows) else "prompt_completion",
        "rows": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "shard": content_hash(encoded(rows)),
    }


def row_hash(row: Mapping[str, Any]) -> str:
    """Of what is imitated, wherever it stands: the name by which a row is excluded."""
    return fingerprint({key: value for key, value in row.items() if key not in ("row", "from", "tokens")})


def order(seed: int, stratum: str, rows: int) -> np.ndarray:
    """[rows] rows of a source by their random places: row r's is word r of a Philox stream of the stratum."""
    words = np.random.Philox(key=keyed.key(seed, "buffer", stratum)).random_raw(rows)
    return np.argsort(words, kind="stable")


def surprising(nats: Sequence[float]) -> list[int]:
    """An order of n rows by `nats` [n], their mean loss: the largest first, but for the hundredth part at the
    top, which comes last. Equals keep their order.

    Surprise-prioritised replay, Hazard et al. 2025, arXiv 2511.22367.
    """
    order = sorted(range(len(nats)), key=lambda row: (-round(nats[row], DIGITS), row))
    odd = len(nats) // ODD
    return order[odd:] + order[:odd]


def excludes(stratum: Stratum, excluded: Collection[str]) -> bool:
    """Whether all of a source is excluded, by its name or its content."""
    return stratum.name in excluded or stratum.source in excluded


def draw(rows: Sequence[Line], *, tokens: int, excluded: Collection[str] = ()) -> list[Line]:
    """The first rows, but for excluded ones, that have `tokens` together: one more would be too many."""
    return list(_within(rows, tokens, excluded))


def _within(rows: Sequence[Line], tokens: int, excluded: Collection[str]) -> Iterator[Line]:
    used = 0
    for row in rows:
        if row["row"] in excluded:
            continue
        used += row["tokens"]
        if used > tokens:
            return
        yield row
