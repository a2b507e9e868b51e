"""Rows that a start has found as a file of the cache, named after what stands in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def written(rows: Sequence[Mapping[str, Any]], directory: Path, name: str) -> Path:
    """A file with these rows: there, or written whole and then moved there."""
    text = lines(rows)
    path = directory / f"{name}-{hashlib.blake2b(text, digest_size=8).hexdigest()}.jsonl"
    if path.is_file() and path.read_bytes() == text:
        return path
    replace(path, text)
    return path


def lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def replace(path: Path, text: bytes) -> None:
    """`text` at `path`, whole or not at all, for its owner to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
