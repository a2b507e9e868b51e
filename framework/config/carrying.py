"""What a run takes from the stages before it: the buffer of the run that its model comes from.

It is found whether it is rehearsed or not, because what this run leaves in turn (`config.leaving`) grows from
it; so a chain of any stages hands everything on. How a buffer is drawn from is `data.buffer`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from framework.config.names import nearest
from framework.config.nodes import Source
from framework.config.schema import Run
from framework.config.synthesis import SELF
from framework.data import buffer, sources
from framework.data.buffer import HASH, MANIFEST, Buffer, Line
from framework.data.tables import Table
from framework.errors import ConfigError, DataError

if TYPE_CHECKING:
    from framework.config.build import Prepared

DIRECTORY = "buffer"  # within that of a run
AUTO = "auto"


@dataclass(frozen=True)
class Carried:
    """What the stages before have left, and what is rehearsed of it."""

    buffer: Buffer
    directory: Path
    excluded: frozenset[str]  # by all of them and by this run
    sources: tuple[Source, ...]  # a file for each stratum that is rehearsed

    def told(self) -> str:
        """For people."""
        names = ", ".join(str(source.name) for source in self.sources)
        return f"rehearses what {self.directory.parent} and the stages before it were trained on: {names}"


def fed(run: Run) -> tuple[Run, Carried | None]:
    """The run with what it carries among its `replay.sources`; without replay where there is nothing.

    None where nothing was left to it. Raises DataError for a buffer that is damaged, or that
    `replay.carry` names and is not there.
    """
    carried, replay = None, run.replay
    if (found := _found(run)) is not None:
        left = buffer.read(found)
        excluded = frozenset((*left.excluded, *replay.excluded))
        drawn = _drawn(run, left, found, excluded) if replay.carry is not None else ()
        carried = Carried(left, found, excluded, drawn)
        if drawn:
            own = tuple(each.model_copy(update={"weight": each.weight or 1.0}) for each in replay.sources)
            replay = replay.model_copy(update={"sources": (*own, *drawn)})
    if replay.carry is not None and not replay.sources:
        replay = replay.idle
    return run.model_copy(update={"replay": replay}), carried


def read(
    run: Run, carried: Carried | None, replayed: Sequence[Source], text: Callable[..., list[Table]]
) -> list[Table]:
    """Tables of `replayed`, the run's own sources and then those that are carried, made by `text`.

    Of what is carried, rows that are too long for this run are left out where its own would be refused:
    nobody can shorten them any more.
    """
    count = len(carried.sources) if carried is not None else 0
    own = replayed[: len(replayed) - count]
    return text(own) + (text(carried.sources, truncation=shortened(run)) if carried is not None else [])


def shortened(run: Run) -> str:
    """What becomes of rows of a buffer that are too long."""
    return "drop" if run.data.truncation == "error" else run.data.truncation


def told(prepared: Prepared) -> str | None:
    """What to say of it at the start of a run; None where nothing was asked for."""
    if prepared.run.replay.carry is None:
        return None
    if prepared.carried is not None and prepared.carried.sources:
        return prepared.carried.told()
    return (
        f"replay.carry: nothing to rehearse: no stage of ours has left any beside {prepared.run.model.path}"
        + ("" if prepared.run.replay.sources else "; trained without replay")
    )


def check(run: Run, carried: Carried | None, own: Sequence[str]) -> None:
    """Refuse to exclude a source that is none; `own` are the names of the run's. Raises ConfigError."""
    known = list(own)
    if carried is not None:
        known += [stratum.name for stratum in carried.buffer.strata] + list(carried.buffer.excluded)
    for name in run.replay.excluded:
        if name not in known and not HASH.fullmatch(name):
            close = nearest(name, known) or known[0]
            raise ConfigError(
                f"replay.excluded: no source of the name {name}; expected the hash of a row, 32 hexadecimal "
                f"digits as RUN/{DIRECTORY} has them, or one of {', '.join(known)}; type "
                f"'replay.excluded=[{close}]'"
            )


def _found(run: Run) -> Path | None:
    """The buffer of the run that is named, or that the model comes from."""
    if run.replay.carry in (None, AUTO):
        beside = Path(run.model.path).expanduser().parent / DIRECTORY
        return beside if (beside / MANIFEST).is_file() and Path(run.model.path).exists() else None
    named = Path(str(run.replay.carry)).expanduser()
    if not (named / DIRECTORY / MANIFEST).is_file():
        raise DataError(
            f"replay.carry: no {DIRECTORY}/{MANIFEST} in there; expected the directory of a run that has "
            "left what it was trained on; type replay.carry=RUN or replay.carry=auto",
            path=named,
        )
    return named / DIRECTORY


def _drawn(run: Run, left: Buffer, directory: Path, excluded: frozenset[str]) -> tuple[Source, ...]:
    """A file in the cache for each stratum, named by its content; not for what the run is given itself.

    All weigh the same: by their rows a short stage would hardly be rehearsed beside a long one.
    """
    files = [own for own in run.replay.sources if own.path != SELF]
    given = {sources.locate(sources.Source(**own.model_dump())).digest for own in files}
    drawn = []
    for stratum in left.strata:
        if stratum.source in given or buffer.excludes(stratum, excluded):
            continue
        rows = buffer.draw(
            buffer.lines(directory, stratum), tokens=run.replay.stratum_tokens, excluded=excluded
        )
        if rows:
            file = filed(run, rows, name=stratum.name)
            drawn.append(file.model_copy(update={"weight": 1.0, "licence": stratum.licence}))
    return tuple(drawn)


def filed(run: Run, rows: Sequence[Line], *, name: str) -> Source:
    """The rows of a stratum as a file in the cache, named by its content. For any number of processes."""
    place, raw = Path(run.data.cache_dir).expanduser() / DIRECTORY, buffer.encoded(rows)
    path = place / f"{buffer.content_hash(raw)}.jsonl"
    if not path.exists():
        place.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds what the user's data says
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(raw)
        os.replace(temporary, path)
    return Source(path=str(path), format=buffer.measures(rows)["format"], name=name)
