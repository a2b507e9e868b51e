"""Numbers per trained token on disk, found again by the content of a segment. Knows no model.

    <fingerprint>/keys-0.bin     two 64-bit words for each of n segments that rank 0 asked for
                  lengths-0.bin  [n] int32, numbers of each: as many for each of its trained tokens
                  values-0.bin   [sum of lengths] fp32
                  manifest.json  size and hash of every file

Every rank writes its own share, so the directory must be shared by all hosts. It appears by one rename,
whole or not at all. Letters: S segments of a batch, K trained positions, n segments on disk.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from framework.batch import Batch
from framework.errors import CheckpointError
from framework.stages import segments
from framework.strategy.base import World

FORMAT = 1  # of the files and of the keys; raise it whenever either changes
MANIFEST = "manifest.json"
DTYPES = {"keys": "<u8", "lengths": "<i4", "values": "<f4"}
READ_BYTES = 1 << 22


def fingerprint(identity: Mapping[str, Any]) -> str:
    """32 hex digits of nested parts, whatever the order of their keys."""
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def keys(batch: Batch) -> np.ndarray:
    """[S, 2] uint64: a 128-bit hash of each segment's tokens and of what is trained in it."""
    ids = batch.input_ids.cpu().numpy().astype("<i4")
    ends = batch.boundaries.cpu().numpy()
    by_segment = segments.order(batch).cpu()
    trained = batch.trained.cpu()[by_segment]
    positions = batch.position_ids.cpu().flatten()[trained].numpy().astype("<i4")
    targets = batch.targets.cpu()[by_segment].numpy().astype("<i4")
    cuts = np.concatenate([[0], np.cumsum(segments.tokens(batch).cpu().numpy())])
    row = ids.ravel() if batch.places is None else ids.ravel()[batch.places.cpu().numpy()]
    answer = np.empty((len(ends) - 1, 2), dtype=np.uint64)
    for s in range(len(ends) - 1):
        begin, end = int(ends[s]), int(ends[s + 1])
        digest = xxhash.xxh3_128((row[begin:end] if batch.packed else ids[s, : end - begin]).tobytes())
        part = slice(cuts[s], cuts[s + 1])
        digest.update(b"trained" + positions[part].tobytes() + targets[part].tobytes())
        answer[s] = np.frombuffer(digest.digest(), dtype="<u8")
    return answer


class Columns:
    """All ranks' columns of one directory, memory-mapped. It must have been found `whole`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ranks = _manifest(directory)["ranks"]
        shards = [
            {name: _map(directory, name, rank, ranks[rank]) for name in DTYPES} for rank in range(len(ranks))
        ]
        found = np.concatenate([shard["keys"].reshape(-1, 2) for shard in shards])
        lengths = np.concatenate([shard["lengths"] for shard in shards]).astype(np.int64)
        owners = np.repeat(np.arange(len(shards)), [len(shard["lengths"]) for shard in shards])
        starts = np.concatenate([_before(shard["lengths"]) for shard in shards])
        order = np.argsort(found[:, 0], kind="stable")
        self._keys, self._lengths = found[order], lengths[order]
        self._owners, self._starts = owners[order], starts[order]
        self._values = [shard["values"] for shard in shards]

    def find(self, key: np.ndarray) -> np.ndarray:
        """The numbers [n] fp32 under a key [2] of `keys`. Raises CheckpointError when there are none."""
        at = int(np.searchsorted(self._keys[:, 0], key[0]))
        while at < len(self._keys) and self._keys[at, 0] == key[0]:
            if self._keys[at, 1] == key[1]:
                start = self._starts[at]
                return self._values[self._owners[at]][start : start + self._lengths[at]]
            at += 1
        raise CheckpointError(
            f"{self.directory}: the reference was never asked about one of the segments trained now; remove "
            "that directory to have it asked again"
        )


def whole(directory: Path, *, world: World) -> bool:
    """Whether the columns are there and as they were written. Collective; ranks share out the hashing."""
    problem = ""
    try:
        files = [
            (name, rank, entry[name])
            for rank, entry in enumerate(_manifest(directory)["ranks"])
            for name in DTYPES
        ]
        for name, rank, entry in files[world.rank :: world.size]:
            _verify(_file(directory, name, rank), entry)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        problem = str(error)
    return not any(world.gather(problem))


def write(directory: Path, answers: Iterable[tuple[Batch, Tensor]], *, world: World) -> None:
    """Make `directory` from (batch, values [K] or [K, w]) pairs of this rank. Collective.

    What is there already is damaged and removed. Where two runs make the same columns at the same time, those
    of the first to end are kept. Raises CheckpointError on
    all ranks when one of them could not write or does not see what the others wrote.
    """
    building = directory.with_name(f"{directory.name}.building-{world.broadcast(secrets.token_hex(4))}")
    if world.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
    writer = _Writer(building, world.rank)
    try:
        for batch, values in answers:  # forward passes are collective: a rank that cannot write goes on
            writer.append(batch, values)
        entry = writer.close()
        ranks = world.gather({"problem": writer.problem, "arrays": entry})
        problem = next((rank["problem"] for rank in ranks if rank["problem"]), None)
        if world.rank == 0 and problem is None:
            problem = _publish(building, directory, {"format": FORMAT, "ranks": [r["arrays"] for r in ranks]})
        problem = world.broadcast(problem)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if problem is not None:
        raise CheckpointError(f"the reference's columns cannot be written: {problem}")
    if not whole(directory, world=world):
        raise CheckpointError(
            f"{directory} is not seen alike by all ranks; it must lie on a file system that all hosts share"
        )


class _Writer:
    """One rank's files. After a failure it remembers why and writes no more."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.problem: str | None = None
        self._directory, self._rank = directory, rank
        self._seen: set[bytes] = set()
        self._files: dict[str, Any] = {}
        self._hashes = {name: xxhash.xxh3_128() for name in DTYPES}
        self._counts = dict.fromkeys(DTYPES, 0)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._files = {name: _file(directory, name, rank).open("xb") for name in DTYPES}
        except OSError as error:
            self.problem = str(error)

    def append(self, batch: Batch, values: Tensor) -> None:
        if self.problem is not None or bool((batch.sources < 0).all()):  # a fill is no row of the data
            return
        counts = segments.tokens(batch).tolist()
        parts = values.float()[segments.order(batch).to(values.device)].cpu().split(counts)
        try:
            for key, part in zip(keys(batch), parts, strict=True):
                if key.tobytes() not in self._seen:
                    self._seen.add(key.tobytes())
                    self._put("keys", key)
                    self._put("lengths", np.array([part.numel()]))
                    self._put("values", part.flatten().numpy())
        except OSError as error:
            self.problem = str(error)

    def _put(self, name: str, values: np.ndarray) -> None:
        raw = np.ascontiguousarray(values, dtype=DTYPES[name]).tobytes()
        self._files[name].write(raw)
        self._hashes[name].update(raw)
        self._counts[name] += len(values)

    def close(self) -> dict[str, dict[str, Any]]:
        """Make the files durable; their entries in the manifest."""
        for file in self._files.values():
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                self.problem = str(error)
            file.close()
        return {
            name: {"count": self._counts[name], "xxh3_128": self._hashes[name].hexdigest()} for name in DTYPES
        }


def _publish(building: Path, directory: Path, manifest: Mapping[str, Any]) -> str | None:
    """Seal and rename; what went wrong, if anything did."""
    try:
        with (building / MANIFEST).open("x") as file:
            file.write(json.dumps(manifest, indent=1))
            file.flush()
            os.fsync(file.fileno())
        if not directory.exists():  # else another run was faster
            os.rename(building, directory)
    except OSError as error:
        return str(error)
    return None


def _manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / MANIFEST).read_text())


def _file(directory: Path, name: str, rank: int) -> Path:
    return directory / f"{name}-{rank}.bin"


def _map(directory: Path, name: str, rank: int, entry: Mapping[str, Any]) -> np.ndarray:
    count = entry[name]["count"]
    if count == 0:
        return np.empty(0, dtype=DTYPES[name])
    return np.memmap(_file(directory, name, rank), dtype=DTYPES[name], mode="r", shape=(count,))


def _verify(path: Path, entry: Mapping[str, Any]) -> None:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    if digest.hexdigest() != entry["xxh3_128"]:
        raise ValueError(f"{path} is not as it was written")


def _before(lengths: np.ndarray) -> np.ndarray:
    """Sums of what comes before each element."""
    return np.cumsum(lengths, dtype=np.int64) - lengths
