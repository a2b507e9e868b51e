"""A directory of arrays that is built once, verified when opened and shared by all processes of a host.

Knows nothing of text: it keeps named numpy arrays as raw files beside a JSON manifest with their sizes and
hashes (no pickle). A build happens under a file lock in a directory of its own and appears by a rename, so
a cache is complete or absent.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
READ_BYTES = 1 << 22


class Damaged(Exception):
    """A cache whose files are not those that were written."""


def fingerprint(parts: Mapping[str, Any]) -> str:
    """32 hex digits of nested parts, whatever the order of their keys."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


class Writer:
    """Appends to named arrays in a directory, then seals it with a manifest."""

    def __init__(self, directory: Path, dtypes: Mapping[str, str]) -> None:
        self.directory = directory
        self.dtypes = dtypes
        self._files = {name: (directory / f"{name}.bin").open("wb") for name in dtypes}
        self._hashes = {name: xxhash.xxh3_128() for name in dtypes}
        self._counts = dict.fromkeys(dtypes, 0)

    def append(self, name: str, values: np.ndarray) -> None:
        raw = np.ascontiguousarray(values, dtype=self.dtypes[name]).tobytes()
        self._files[name].write(raw)
        self._hashes[name].update(raw)
        self._counts[name] += len(values)

    def seal(self, facts: Mapping[str, Any]) -> None:
        arrays = {
            name: {"dtype": dtype, "count": self._counts[name], "xxh3_128": self._hashes[name].hexdigest()}
            for name, dtype in self.dtypes.items()
        }
        self.close()
        (self.directory / MANIFEST).write_text(json.dumps({"arrays": arrays, "facts": facts}, indent=1))

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def open_arrays(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a sealed directory as read-only memory maps, and its facts.

    Every file is hashed (gigabytes a second). Raises Damaged where one is missing or not as written.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        arrays = {name: _open(directory / f"{name}.bin", entry) for name, entry in manifest["arrays"].items()}
        return arrays, manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{directory}: {error}") from error


def _open(path: Path, entry: Mapping[str, Any]) -> np.ndarray:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    if digest.hexdigest() != entry["xxh3_128"]:
        raise ValueError(f"{path.name} is not as it was written")
    if entry["count"] == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=entry["dtype"])
    return np.memmap(path, dtype=entry["dtype"], mode="r", shape=(entry["count"],))


def get_or_build(
    root: Path, key: str, build: Callable[[Path], None]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays under `key`, built by `build(empty directory)` when they are absent or damaged.

    Of several processes one builds and the others wait and then map what it built. A failing build
    raises what it raised and leaves nothing behind.
    """
    root.mkdir(parents=True, exist_ok=True)
    directory, building = root / key, root / f"{key}.building"
    with locked(root / f"{key}.lock"):
        if directory.exists():
            try:
                return open_arrays(directory)
            except Damaged as error:
                log.warning("cached data is damaged and is made again: %s", error)
                shutil.rmtree(directory)
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        building.mkdir(mode=0o700)  # it holds what the user's data says
        try:
            build(building)
            os.rename(building, directory)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return open_arrays(directory)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file that goes away with its last holder, also when that one is killed."""
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            current = os.stat(path).st_ino
        except FileNotFoundError:
            current = -1
        if current == os.fstat(handle).st_ino:
            break
        os.close(handle)  # the holder before us removed the file: lock the new one
    try:
        yield
    finally:
        os.unlink(path)
        os.close(handle)
