"""Where rows come from: JSONL, JSON and Parquet files, `datasets` directories and hub ids.

Knows files, not formats: it yields parsed rows with their place, and a digest of the content for the cache.
The only room that imports `datasets`. Nothing that comes with a data set is ever executed.
"""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from framework.data.fields import RowError
from framework.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Source:
    """One entry of `data.train`, `data.eval` or `replay.sources`."""

    path: str  # a file, a glob, a directory, or a hub id `owner/name[:subset]`
    format: str = "auto"  # a key of formats.FIELDS, or auto
    weight: float | None = None  # share of rows among the sources of its list; None: by number of rows
    name: str | None = None  # in metrics; None: from the path
    split: str = "train"  # of a `datasets` directory or hub id
    licence: str | None = None  # of its rows, written down wherever some of them are kept


class Placed(NamedTuple):
    """A row and where it stands."""

    file: int  # index into `Located.files`
    line: int  # 1-based line of a JSONL file, 1-based row of anything else
    value: Any  # the parsed row, or the RowError that reading it gave


@dataclass(frozen=True)
class Located:
    """A source that was found: its files, a digest of their content and a way to read them."""

    files: tuple[str, ...]
    digest: str
    rows: Callable[[], Iterator[Placed]]

    def where(self, file: int, line: int) -> str:
        """`train.jsonl:17`, or `train.parquet row 17` where lines mean nothing."""
        return place(self.files[file], line)


def place(path: str, line: int) -> str:
    """How a row is called in messages."""
    return f"{path}:{line}" if _by_line(path) else f"{path} row {line}"


def refuse(path: str, line: int, message: str) -> DataError:
    """A DataError that leads to one row."""
    if _by_line(path):
        return DataError(message, path=path, line=line)
    return DataError(f"row {line}: {message}", path=path)


def _by_line(path: str) -> bool:
    suffix = Path(path).suffix
    return suffix in (".jsonl", ".ndjson") or (suffix == ".json" and not _is_json_list(Path(path)))


def locate(source: Source) -> Located:
    """Find what `source.path` names.

    Raises DataError, with the nearest existing name, when there is nothing or when it cannot be read.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _from_datasets_directory(path, source.split)
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"no {', '.join(SUFFIXES)} file and no saved data set in there", path=path)
        return _from_files(files)
    if path.is_file():
        return _from_files([path])
    if path.exists():
        raise DataError("not a regular file; expected a file with rows in it", path=path)
    if any(letter in source.path for letter in "*?["):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise DataError("no file matches this pattern", path=source.path)
        return _from_files(found)
    if path.suffix in SUFFIXES or path.is_absolute() or source.path.startswith((".", "~")):
        raise DataError(f"no such file{_nearest(path)}", path=source.path)
    return _from_hub(source, _nearest(path))


def _nearest(path: Path) -> str:
    """Names the part that is missing and what comes closest to it."""
    while not path.parent.is_dir():
        path = path.parent
    names = [p.name for p in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"; nearest is {path.parent / close[0]}"
    return f"; {path.parent} holds {', '.join(sorted(names)[:5]) or 'nothing'}"


def _from_files(paths: Sequence[Path]) -> Located:
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise DataError(f"unknown kind of file; expected {', '.join(SUFFIXES)}", path=path)
        if path.stat().st_size == 0:
            raise DataError("the file is empty; expected one row or more", path=path)

    def rows() -> Iterator[Placed]:
        for number, path in enumerate(paths):
            read = _read_parquet if path.suffix == ".parquet" else _read_json
            for line, value in read(path):
                yield Placed(number, line, value)

    return Located(tuple(map(str, paths)), _digest_of_files(paths), rows)


def _digest_of_files(paths: Sequence[Path]) -> str:
    """Of content only: the same rows elsewhere, or copied anew, are the same source."""
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(f"{path.suffix} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _is_json_list(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith(b"[")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".json" and _is_json_list(path):
        yield from _read_json_list(path)
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():  # blank lines, as editors leave at the end, are no rows
                yield number, _parse_line(raw)


def _parse_line(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode(), parse_constant=_not_a_number)
    except UnicodeDecodeError as error:
        return RowError("invalid UTF-8", f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        # by the place in the line: one that breaks off ends on the next, as the parser counts
        return RowError("invalid JSON", f"not JSON at column {error.pos + 1}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return RowError("invalid JSON", f"not JSON: {error}")


def _not_a_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _read_json_list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_not_a_number)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start + 1}", path=path) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON at column {error.colno}: {error.msg}", path=path, line=error.lineno
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", path=path) from None
    yield from enumerate(rows, start=1)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file: {error}", path=path) from None


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct all keys that any row has; a null there means that the key is absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _from_datasets_directory(path: Path, split: str) -> Located:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"no split {split!r}; it has {', '.join(loaded)}: set split", path=path)
        loaded = loaded[split]
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (".arrow", ".json"))
    return _from_dataset(loaded, str(path), f"{_digest_of_files(files)}/{split}")


def _from_hub(source: Source, nearest: str) -> Located:
    import datasets

    name, _, subset = source.path.partition(":")
    try:
        loaded = datasets.load_dataset(name, subset or None, split=source.split)
    except Exception as error:
        # The library raises whatever its transport raised; a person needs the name and the reason.
        raise DataError(
            f"no such file or directory{nearest}; and no data set of this name could be loaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})",
            path=source.path,
        ) from None
    return _from_dataset(loaded, source.path, f"{loaded._fingerprint}/{source.split}")


def _from_dataset(loaded: Any, name: str, digest: str) -> Located:
    def rows() -> Iterator[Placed]:
        for number, row in enumerate(loaded.with_format(None), start=1):
            yield Placed(0, number, _without_nulls(row))

    return Located((name,), digest, rows)
