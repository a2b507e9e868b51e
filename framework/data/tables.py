"""Tokenised sources: examples with random access, made once and kept on disk.

`prepare` reads, normalises, renders and tokenises every source and answers one `Table` each. Letters: n
examples, T tokens of one example. It knows no mixture, no batch and no rank; all processes of a host share
the memory-mapped result.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from framework.data import cache, sources, templates
from framework.data.chat import Encoded, Encoder
from framework.data.records import FORMATS, Record, RowError, detect, parse
from framework.data.sources import Located, Placed, Source
from framework.errors import DataError

FORMAT_VERSION = 1  # of the cached arrays; raise it whenever the same row would give other tokens
ARRAYS = {
    "tokens": "<i4",
    "trained": "|b1",
    "lengths": "<i4",
    "counts": "<i4",
    "files": "<i4",
    "lines": "<i8",
}
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


@dataclass(frozen=True)
class Table:
    """The n examples of one source."""

    name: str
    fingerprint: str  # of content, tokenizer, template and settings: equal means equal examples
    format: str
    counts: Counts
    lengths: np.ndarray  # [n] int32, tokens
    trained: np.ndarray  # [n] int32, trained tokens: never 0
    weight: float | None
    _files: tuple[str, ...]
    _arrays: dict[str, np.ndarray]
    _offsets: np.ndarray  # [n + 1] int64, first token of each example

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids [T] int32, trained [T] bool) of one example, as views of the file.

        `trained[t]` says that token t is learnt from the tokens before it; `trained[0]` is never set.
        """
        part = slice(self._offsets[row], self._offsets[row + 1])
        return self._arrays["tokens"][part], self._arrays["trained"][part]

    def where(self, row: int) -> str:
        """The place of an example, for messages: `train.jsonl:17`."""
        return sources.place(self._files[self._arrays["files"][row]], int(self._arrays["lines"][row]))


def prepare(
    wanted: Sequence[Source],
    *,
    tokenizer: Any,
    chat_template: str | None = None,
    max_length: int,
    truncation: str = "error",
    train_on: str = "assistant",
    on_bad_row: str = "error",
    cache_dir: str | Path,
    workers: int | None = 1,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> list[Table]:
    """One table per source, from the cache where it holds the same content under the same settings.

    `chat_template` as in `templates.resolve`; `max_length` in tokens; `truncation` and `train_on` as in
    `chat.Encoder`. `on_bad_row`: "error" refuses the first malformed, empty or untrainable row, "drop"
    counts it by reason. `workers` processes tokenise large sources (None: one per core); the result
    does not depend on them. `vocab_size`: token ids must stay below it.

    Raises DataError for files and rows, ModelError for the tokenizer and its template.
    """
    template = templates.resolve(tokenizer, chat_template)
    settings: dict[str, Any] = {
        "max_length": max_length,
        "truncation": truncation,
        "train_on": train_on,
        "vocab_size": vocab_size,
    }
    identity = {
        "version": FORMAT_VERSION,
        "tokenizer": tokenizer_identity(tokenizer),
        "template": template,
        "on_bad_row": on_bad_row,
        **settings,
    }
    encoder = Encoder(tokenizer, template, **settings)
    helpers = workers if workers is not None else len(os.sched_getaffinity(0))
    tables = []
    for source, name in zip(wanted, _names(wanted), strict=True):
        located = sources.locate(source)
        key = cache.fingerprint({**identity, "content": located.digest, "format": source.format})

        def report(rows: int, name: str = name) -> None:
            if progress is not None:
                progress(name, rows)

        def build(
            directory: Path, source: Source = source, located: Located = located, report: Any = report
        ) -> None:
            _build(directory, source, located, encoder, on_bad_row, helpers, report)

        arrays, facts = cache.get_or_build(Path(cache_dir).expanduser(), key, build)
        lengths = np.asarray(arrays["lengths"])
        tables.append(
            Table(
                name=name,
                fingerprint=key,
                format=facts["format"],
                counts=Counts(**facts["counts"]),
                lengths=lengths,
                trained=np.asarray(arrays["counts"]),
                weight=source.weight,
                _files=located.files,
                _arrays=arrays,
                _offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            )
        )
    return tables


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
    encoder: Encoder,
    on_bad_row: str,
    workers: int,
    report: Callable[[int], None],
) -> None:
    rows = located.rows()
    first = list(itertools.islice(rows, DETECTION_ROWS))
    format = source.format if source.format != "auto" else _detected(first, source, located)
    writer = cache.Writer(directory, ARRAYS)
    dropped: Counter[str] = Counter()
    read = truncated = tokens = trained_tokens = 0
    example: tuple[Placed, RowError] | None = None
    try:
        for chunk, answers in _encoded(_chunks(itertools.chain(first, rows)), encoder, format, workers):
            kept = []
            for placed, answer in zip(chunk, answers, strict=True):
                if isinstance(answer, Encoded):
                    kept.append((placed, answer))
                    continue
                wished = answer.reason == "over-long" and encoder.truncation == "drop"
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
                _append(writer, kept)
                truncated += sum(e.truncated for _, e in kept)
                tokens += sum(len(e.input_ids) for _, e in kept)
                trained_tokens += sum(int(e.trained.sum()) for _, e in kept)
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


def _detected(first: Sequence[Placed], source: Source, located: Located) -> str:
    values = [placed.value for placed in first]
    try:
        found = detect(values)
    except RowError as error:
        raise DataError(
            f"{error}; expected one format: set format to one of {', '.join(FORMATS)}", path=source.path
        ) from None
    if found is not None:
        return found
    first_bad = next((placed for placed in first if isinstance(placed.value, RowError)), None)
    if first_bad is not None:
        raise sources.refuse(located.files[first_bad.file], first_bad.line, str(first_bad.value))
    if not first:
        raise DataError("there are no rows; expected one row or more", path=source.path)
    fields = sorted({str(key) for value in values if isinstance(value, dict) for key in value})
    raise DataError(
        f"found {'fields ' + ', '.join(fields) if fields else 'no fields'}; expected messages, prompt and "
        "completion, instruction and output, conversations, or text: rename the fields, or set format to "
        f"one of {', '.join(FORMATS)}",
        path=source.path,
    )


def _append(writer: cache.Writer, kept: Sequence[tuple[Placed, Encoded]]) -> None:
    writer.append("tokens", np.concatenate([e.input_ids for _, e in kept]))
    writer.append("trained", np.concatenate([e.trained for _, e in kept]))
    writer.append("lengths", np.array([len(e.input_ids) for _, e in kept]))
    writer.append("counts", np.array([e.trained.sum() for _, e in kept]))
    writer.append("files", np.array([placed.file for placed, _ in kept]))
    writer.append("lines", np.array([placed.line for placed, _ in kept]))


def _chunks(rows: Iterator[Placed]) -> Iterator[list[Placed]]:
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


Answers = list[Encoded | RowError]


def _encoded(
    chunks: Iterator[list[Placed]], encoder: Encoder, format: str, workers: int
) -> Iterator[tuple[list[Placed], Answers]]:
    """Chunks and their answers, in order. The first ones here; with more to come, in `workers` processes."""
    for chunk in itertools.islice(chunks, INLINE_CHUNKS) if workers > 1 else chunks:
        yield chunk, _encode(encoder, format, [placed.value for placed in chunk])
    rest = next(chunks, None)
    if rest is None:
        return
    # Not forked: this process has threads of torch and of the tokenizer.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(encoder, format)) as pool:
        waiting: deque[tuple[list[Placed], Future[Answers]]] = deque()
        try:
            for chunk in itertools.chain([rest], chunks):
                waiting.append((chunk, pool.submit(_encode_there, [placed.value for placed in chunk])))
                if len(waiting) > 4 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_here: tuple[Encoder, str] | None = None  # of a helper process, set once at its start


def _start(encoder: Encoder, format: str) -> None:
    global _here
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    _here = encoder, format


def _encode_there(values: Sequence[Any]) -> Answers:
    assert _here is not None
    return _encode(*_here, values)


def _encode(encoder: Encoder, format: str, values: Sequence[Any]) -> Answers:
    answers: list[Encoded | RowError | Record] = []
    for value in values:
        try:
            answers.append(value if isinstance(value, RowError) else parse(value, format))
        except RowError as error:
            answers.append(error)
    encoded = iter(encoder.encode([answer for answer in answers if isinstance(answer, Record)]))
    return [next(encoded) if isinstance(answer, Record) else answer for answer in answers]
