"""From sources to cached arrays: read, detect the format, tokenise, count, write. Made once.

Knows no format and no array by name: a `Reader` does. Large sources are tokenised by helper processes; the
result does not depend on them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from framework.data import cache, formats, sources
from framework.data.fields import RowError
from framework.data.sources import Located, Placed, Source
from framework.errors import DataError

FORMAT_VERSION = 1  # of the cached arrays; raise it whenever the same row would give other tokens
PLACES = {"files": "<i4", "lines": "<i8"}  # arrays that every table has: where each row stands
CHUNK = 256  # rows that are tokenised together
INLINE_CHUNKS = 128  # tokenised before helpers pay: starting one costs seconds
DETECTION_ROWS = 20  # first rows that must agree on a format

Progress = Callable[[str, int], None]
"""progress(source name, rows read so far), called once a chunk."""


@dataclass(frozen=True)
class Counts:
    """What became of a source's rows. rows = kept + sum of dropped."""

    rows: int
    kept: int
    truncated: int
    tokens: int  # of kept rows, after truncation
    trained_tokens: int
    dropped: dict[str, int] = field(default_factory=dict)  # by reason


class Example(Protocol):
    """One row, tokenised."""

    @property
    def truncated(self) -> bool: ...

    def columns(self) -> Mapping[str, Any]:
        """What is appended to each array of its reader: `tokens` and `trained`, [T] each, and others."""


class Reader(Protocol):
    """Turns rows into examples. It is pickled into helper processes."""

    @property
    def formats(self) -> Collection[str]:
        """What rows may be; the first that fits them rules."""

    @property
    def arrays(self) -> Mapping[str, str]:
        """Name -> dtype of what examples are kept as."""

    @property
    def truncation(self) -> str:
        """With "drop", rows that are refused as "over-long" are left out, whatever is done with bad rows."""

    def read(self, values: Sequence[Any], format: str) -> Sequence[Example | RowError]:
        """An answer for each row, in order."""


class Cached(NamedTuple):
    """One source as arrays on disk."""

    name: str
    fingerprint: str  # of content, tokenizer, template and settings: equal means equal examples
    format: str
    counts: Counts
    weight: float | None
    files: tuple[str, ...]
    arrays: dict[str, np.ndarray]


def prepare(
    wanted: Sequence[Source],
    reader: Reader,
    *,
    identity: Mapping[str, Any],
    on_bad_row: str,
    cache_dir: str | Path,
    workers: int | None,
    progress: Progress | None,
) -> list[Cached]:
    """Every source, from the cache where it holds the same content under the same `identity`.

    `identity` is what decides which arrays a source gives, besides its content. Raises DataError for files
    and rows, and what the reader raises.
    """
    identity = {"version": FORMAT_VERSION, "on_bad_row": on_bad_row, **identity}
    helpers = workers if workers is not None else len(os.sched_getaffinity(0))
    found = []
    for source, name in zip(wanted, _names(wanted), strict=True):
        located = sources.locate(source)
        key = cache.fingerprint({**identity, "content": located.digest, "format": source.format})

        def report(rows: int, name: str = name) -> None:
            if progress is not None:
                progress(name, rows)

        def build(
            directory: Path, source: Source = source, located: Located = located, report: Any = report
        ) -> None:
            _build(directory, source, located, reader, on_bad_row, helpers, report)

        arrays, facts = cache.get_or_build(Path(cache_dir).expanduser(), key, build)
        counts = Counts(**facts["counts"])
        found.append(Cached(name, key, facts["format"], counts, source.weight, located.files, arrays))
    return found


def _names(wanted: Sequence[Source]) -> list[str]:
    """Names for metrics, unique and without slashes: given, or from the path."""
    names: list[str] = []
    for source in wanted:
        base = source.name or Path(source.path.rstrip("/*?")).name.split(".")[0] or "data"
        base = base.replace("/", "-").replace("*", "").replace("?", "") or "data"
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def tokenizer_identity(tokenizer: Any) -> str:
    """A digest of everything that decides which ids a text gives."""
    import tokenizers
    import transformers

    parts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": tokenizer.special_tokens_map,
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # both are left by the last call and set anew by the next
        backend.no_padding()
        parts["backend"] = backend.to_str()
    else:
        parts["vocabulary"] = tokenizer.get_vocab()
        parts["settings"] = {key: str(value) for key, value in tokenizer.init_kwargs.items()}
    return cache.fingerprint(parts)


def _build(
    directory: Path,
    source: Source,
    located: Located,
    reader: Reader,
    on_bad_row: str,
    workers: int,
    report: Callable[[int], None],
) -> None:
    rows = located.rows()
    first = list(itertools.islice(rows, DETECTION_ROWS))
    format = _wanted(source, reader) if source.format != "auto" else _detected(first, source, located, reader)
    writer = cache.Writer(directory, {**reader.arrays, **PLACES})
    dropped: Counter[str] = Counter()
    read = truncated = tokens = trained_tokens = 0
    example: tuple[Placed, RowError] | None = None
    try:
        for chunk, answers in _answers(_chunks(itertools.chain(first, rows)), reader, format, workers):
            kept: list[tuple[Placed, Example]] = []
            for placed, answer in zip(chunk, answers, strict=True):
                if not isinstance(answer, RowError):
                    kept.append((placed, answer))
                    continue
                wished = answer.reason == "over-long" and reader.truncation == "drop"
                if on_bad_row == "error" and not wished:
                    raise sources.refuse(
                        located.files[placed.file],
                        placed.line,
                        f"{answer.detail}; pass data.on_bad_row=drop to skip such rows",
                    )
                dropped[answer.reason] += 1
                example = example or (placed, answer)
            read += len(chunk)
            if kept:
                columns = _append(writer, kept)
                truncated += sum(e.truncated for _, e in kept)
                tokens += len(columns["tokens"])
                trained_tokens += int(columns["trained"].sum())
            report(read)
        if read == sum(dropped.values()):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
            first_bad = f"; the first is {located.where(*example[0][:2])}: {example[1]}" if example else ""
            raise DataError(
                f"none of the {read} rows can be trained on ({reasons or 'there are none'}){first_bad}",
                path=source.path,
            )
        kept_rows = read - sum(dropped.values())
        counts = Counts(read, kept_rows, truncated, tokens, trained_tokens, dict(sorted(dropped.items())))
        writer.seal({"format": format, "counts": asdict(counts)})
    finally:
        writer.close()


def _wanted(source: Source, reader: Reader) -> str:
    """The format that the source names, which must be one that is of use here."""
    if source.format in reader.formats:
        return source.format
    raise DataError(
        f"format={source.format} is for {formats.USED_BY.get(source.format, formats.SUPERVISED)}; expected "
        f"rows with {formats.expected(reader.formats)}: set format to one of {', '.join(reader.formats)}",
        path=source.path,
    )


def _detected(first: Sequence[Placed], source: Source, located: Located, reader: Reader) -> str:
    values = [placed.value for placed in first]
    options = ", ".join(reader.formats)
    try:
        found = formats.detect(values, reader.formats)
    except RowError as error:
        raise DataError(
            f"{error}; expected one format: set format to one of {options}", path=source.path
        ) from None
    if found is not None:
        return found
    if not first:
        raise DataError("there are no rows; expected one row or more", path=source.path)
    bad = next((placed for placed in first if isinstance(placed.value, RowError)), first[0])
    if isinstance(bad.value, RowError):
        raise sources.refuse(located.files[bad.file], bad.line, str(bad.value))
    fields = sorted({str(key) for value in values if isinstance(value, dict) for key in value})
    raise sources.refuse(
        located.files[bad.file],
        bad.line,
        f"found {'fields ' + ', '.join(fields) if fields else 'no fields'}; expected "
        f"{formats.expected(reader.formats)}: rename the fields, or set format to one of {options}"
        f"{formats.hint(values, reader.formats)}",
    )


def _append(writer: cache.Writer, kept: Sequence[tuple[Placed, Example]]) -> dict[str, np.ndarray]:
    """Writes what the examples give to each array, joined, and answers it."""
    by_example = [example.columns() for _, example in kept]
    columns = {name: np.concatenate([each[name] for each in by_example]) for name in by_example[0]}
    columns["files"] = np.array([placed.file for placed, _ in kept])
    columns["lines"] = np.array([placed.line for placed, _ in kept])
    for name, values in columns.items():
        writer.append(name, values)
    return columns


def _chunks(rows: Iterator[Placed]) -> Iterator[list[Placed]]:
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


Answers = list[Example | RowError]


def _answers(
    chunks: Iterator[list[Placed]], reader: Reader, format: str, workers: int
) -> Iterator[tuple[list[Placed], Answers]]:
    """Chunks and their answers, in order. The first ones here; with more to come, in `workers` processes."""
    for chunk in itertools.islice(chunks, INLINE_CHUNKS) if workers > 1 else chunks:
        yield chunk, _read(reader, format, [placed.value for placed in chunk])
    rest = next(chunks, None)
    if rest is None:
        return
    # Not forked: this process has threads of torch and of the tokenizer.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(reader, format)) as pool:
        waiting: deque[tuple[list[Placed], Future[Answers]]] = deque()
        try:
            for chunk in itertools.chain([rest], chunks):
                waiting.append((chunk, pool.submit(_read_there, [placed.value for placed in chunk])))
                if len(waiting) > 4 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_here: tuple[Reader, str] | None = None  # of a helper process, set once at its start


def _start(reader: Reader, format: str) -> None:
    global _here
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    _here = reader, format


def _read_there(values: Sequence[Any]) -> Answers:
    assert _here is not None
    return _read(*_here, values)


def _read(reader: Reader, format: str, values: Sequence[Any]) -> Answers:
    """What could not even be read stays as it is; the reader answers for the rest."""
    answers = iter(reader.read([value for value in values if not isinstance(value, RowError)], format))
    return [value if isinstance(value, RowError) else next(answers) for value in values]
