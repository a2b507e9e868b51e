"""A checkpoint on disk: its files, its sealed manifest and the system calls that make it durable.

    step-000020/                  whole, or not there at all: the name appears in one rename
        shard-0-of-2.safetensors  flat fp32 slices, keys "<parameter>:<value>:<start>:<stop>"
        shard-1-of-2.safetensors  (a reader sees safetensors; the header also carries the save id)
        manifest.json             size and hash of every shard, where every slice is, trainer state
    step-000040.tmp-<save id>/    a save under way, or the debris of a dead one
    step-000060.aside-<hex>/      left behind by a run that went back to an earlier step

No pickle is written and none is read: safetensors and JSON only. Hashes (xxh3-128, 11 GB/s) catch
damage, not forgery. This module knows no ranks; `checkpoint` makes them agree.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = 1  # of the manifest; another number is refused
MANIFEST = "manifest.json"
COMMITTED = re.compile(r"step-(\d{6,12})")
DEBRIS = re.compile(r"step-\d{6,12}\.tmp-[0-9a-f]+")
SHARD = re.compile(r"shard-\d+-of-\d+\.safetensors")

_CHUNK = 1 << 24  # bytes hashed, then written, at a time: small enough to stay in cache
_SEAL = re.compile(rb',\n"seal": "([0-9a-f]{32})"\n}\n\Z')


def key(name: str, which: str, start: int, stop: int) -> str:
    """The key in a shard of elements start..stop-1 of a flattened value of a parameter."""
    return f"{name}:{which}:{start}:{stop}"


@dataclass(frozen=True)
class Parameter:
    """Where the values of one parameter are. `pieces` are in order and cover it exactly once."""

    shape: tuple[int, ...]
    values: tuple[str, ...]  # master, exp_avg, exp_avg_sq
    pieces: tuple[tuple[str, int, int], ...]  # (file, start, stop) of each contiguous slice


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its numbers."""

    save_id: str
    step: int  # optimizer steps done
    updates: int  # optimizer updates applied: AdamW's step count
    world_size: int  # ranks that wrote it; any number may read it
    identity: Mapping[str, Any]  # fingerprints of what must not change under a run
    state: Mapping[str, Any]  # of the trainer
    files: Mapping[str, tuple[int, str]]  # name -> (bytes, xxh3-128 in hexadecimal)
    parameters: Mapping[str, Parameter]

    def encode(self) -> bytes:
        """JSON, a line for each key, closed by the hash of all that stands before it."""
        body = {
            "format": FORMAT,
            "save_id": self.save_id,
            "step": self.step,
            "updates": self.updates,
            "world_size": self.world_size,
            "identity": self.identity,
            "state": self.state,
            "files": {n: {"bytes": size, "xxh3_128": digest} for n, (size, digest) in self.files.items()},
            "parameters": {n: vars(parameter) for n, parameter in self.parameters.items()},
        }
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(value)}" for k, value in body.items())
        text = b"{\n" + lines.encode()
        return text + b',\n"seal": "%s"\n}\n' % xxhash.xxh3_128_hexdigest(text).encode()

    @classmethod
    def decode(cls, raw: bytes) -> Manifest:
        """Raises `ValueError` saying what is wrong with `raw`."""
        sealed = _SEAL.search(raw)
        if sealed is None:
            raise ValueError("its last line, the seal, is missing (truncated or not of this program)")
        if xxhash.xxh3_128_hexdigest(raw[: sealed.start()]).encode() != sealed[1]:
            raise ValueError("its content does not match its seal")
        try:
            return cls._from_body(json.loads(raw))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is not laid out as format {FORMAT}: {error!r}") from error

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> Manifest:
        if body["format"] != FORMAT:
            raise ValueError(f"it is of format {body['format']!r}; this program reads {FORMAT}")
        files = {name: (int(file["bytes"]), str(file["xxh3_128"])) for name, file in body["files"].items()}
        for name in files:
            if not SHARD.fullmatch(name):
                raise ValueError(f"it names a file {name!r}; only shard-R-of-W.safetensors may be in it")
        parameters = {}
        for name, entry in body["parameters"].items():
            pieces = tuple((str(file), int(start), int(stop)) for file, start, stop in entry["pieces"])
            parameter = Parameter(tuple(map(int, entry["shape"])), tuple(map(str, entry["values"])), pieces)
            if problem := uncovered(parameter):
                raise ValueError(f"the slices of {name} {problem}")
            if stray := {file for file, _, _ in pieces} - files.keys():
                raise ValueError(f"{name} is in {sorted(stray)}, which it does not list")
            parameters[name] = parameter
        return cls(
            save_id=str(body["save_id"]),
            step=int(body["step"]),
            updates=int(body["updates"]),
            world_size=int(body["world_size"]),
            identity=dict(body["identity"]),
            state=dict(body["state"]),
            files=files,
            parameters=parameters,
        )

    def keys(self, file: str) -> dict[str, int]:
        """Keys that `file` must hold, with the number of elements of each."""
        return {
            key(name, which, start, stop): stop - start
            for name, parameter in self.parameters.items()
            for where, start, stop in parameter.pieces
            if where == file
            for which in parameter.values
        }


def uncovered(parameter: Parameter) -> str | None:
    """What is wrong with a parameter's slices, or None when each element is in exactly one."""
    reached = 0
    for file, start, stop in parameter.pieces:
        if start != reached or stop <= start:
            return f"do not follow on: {file} has {start}..{stop} where {reached} should begin"
        reached = stop
    total = math.prod(parameter.shape)
    return None if reached == total else f"end at {reached} of {total} elements"


def write(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Make `path` anew from `parts`, durably: written, flushed and fsynced. -> (bytes, xxh3-128).

    The hash is of what was handed to the kernel, taken on the way. Raises `OSError`, also when
    the file is there already: a checkpoint never overwrites.
    """
    digest, size = xxhash.xxh3_128(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            for at in range(0, len(view), _CHUNK):
                chunk = view[at : at + _CHUNK]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
            size += len(view)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def shard(entries: Sequence[tuple[str, Tensor]], save_id: str) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of `entries`: (key, [n] fp32 on the CPU).

    Laid out by hand because the library's writer copies the whole file into memory first and
    neither hashes nor syncs: 8 bytes of header length, the JSON header padded to 8, the numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"save_id": save_id, "format": str(FORMAT)}}
    reached = 0
    for name, tensor in entries:
        header[name] = {
            "dtype": "F32",
            "shape": [tensor.numel()],
            "data_offsets": [reached, reached + 4 * tensor.numel()],
        }
        reached += 4 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in entries:
        yield tensor.contiguous().numpy().data


def read_manifest(directory: Path) -> bytes:
    """The manifest's bytes. Raises `ValueError` where there is no plain file of that name."""
    path = directory / MANIFEST
    _plain_file(path)
    return path.read_bytes()


def damage(directory: Path, manifest: Manifest, name: str) -> str | None:
    """What is wrong with one file of a checkpoint, or None. Reads all of it."""
    path = directory / name
    size, digest = manifest.files[name]
    try:
        found = _plain_file(path)
        if found != size:
            return f"{path} has {found:,} bytes, {MANIFEST} says {size:,}"
        if _hash(path) != digest:
            return f"{path} does not match the hash in {MANIFEST}: its content changed after it was written"
        with safe_open(path, framework="pt") as file:
            save_id = (file.metadata() or {}).get("save_id")
            lengths = {name: _elements(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        return f"{path} cannot be read: {error}"
    if save_id != manifest.save_id:
        return f"{path} is of save {save_id}, {MANIFEST} of save {manifest.save_id}: two saves are mixed"
    if lengths != manifest.keys(name):
        odd = sorted(lengths.items() ^ manifest.keys(name).items())[0][0]
        return f"{path} and {MANIFEST} do not list the same slices (first: {odd})"
    return None


def _elements(part: Any) -> int:
    """Length of a flat fp32 tensor in a safetensors file."""
    shape = part.get_shape()
    if part.get_dtype() != "F32" or len(shape) != 1:
        raise ValueError(f"a slice is {part.get_dtype()}{shape}, expected flat F32")
    return shape[0]


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _plain_file(path: Path) -> int:
    """Size in bytes. Raises `ValueError` when missing, a link, a directory or a device."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a plain file (a link, a directory or a device)")
    return status.st_size
