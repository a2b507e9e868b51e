"""Saves and restores a run, all ranks agreeing: a checkpoint is whole and durable, or not there.

Each rank writes its own slices, so no rank ever holds the whole state, and any number of ranks
under any strategy may read them back by parameter name. The files and their format are in `commit`,
reading back is in `restore`.
A collective decides every outcome, so a full disk on one rank fails the save on all of them alike.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.errors import CheckpointError
from framework.strategy.base import FIRST, MASTER, SECOND, EngineState, World
from framework.train import commit
from framework.train.commit import Manifest, Parameter
from framework.train.restore import Checkpoint


class Checkpointer:
    """The checkpoints of one run, in one directory that all hosts share.

    `keep` newest ones stay; `identity` holds fingerprints of what must not change under a run
    (data, tokenizer, model, adapter): a checkpoint must agree on what is named here. `say` gets
    plain-language notices, on rank 0 only.
    Only one run may save to a directory at a time: a save first removes the debris of dead ones.
    """

    def __init__(
        self,
        directory: Path,
        *,
        world: World,
        keep: int,
        identity: Mapping[str, Any],
        say: Callable[[str], None] = logging.getLogger(__name__).warning,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = Path(directory)
        self.world = world
        self.keep = keep
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self._say = say if world.rank == 0 else lambda message: None
        self._step = -1  # of the checkpoint in this directory that the run stands on; -1 = none

    # -- saving ---------------------------------------------------------------------------------

    def save(self, step: int, engine_state: EngineState, state: Mapping[str, Any]) -> Path:
        """Commit `engine_state` and the JSON-able `state` as of `step`. Collective.

        Returns when the checkpoint is durable. Raises `CheckpointError` on all ranks alike when
        any of them could not write; what it left is removed, older checkpoints stand, training
        may go on. Saving the step that the run stands on again does nothing.
        """
        final = self.directory / f"step-{step:06d}"
        if step == self._step:
            return final
        if step < self._step:
            raise ValueError(f"step {step} is before step {self._step}, which is committed")
        save_id = self.world.broadcast(secrets.token_hex(8))
        temporary = self.directory / f"{final.name}.tmp-{save_id}"
        try:
            self._agree(lambda: self._begin(temporary), only=0)
            written = self._agree(lambda: self._write_shard(temporary, save_id, engine_state))
            manifest = Manifest(
                save_id=save_id,
                step=step,
                updates=engine_state.updates,
                world_size=self.world.size,
                identity=self.identity,
                state=state,
                files={part["file"]: (part["bytes"], part["xxh3_128"]) for part in written},
                parameters=_join(written),
            )
            self._agree(lambda: self._commit(temporary, final, manifest), only=0)
        except CheckpointError as error:
            if self.world.rank == 0:
                self._delete(temporary)
            kept = f"step {self._step}" if self._step >= 0 else "none yet"
            raise CheckpointError(
                f"the checkpoint of step {step} was not saved; the newest one is still {kept}. {error}"
            ) from error
        self._step = step
        if self.world.rank == 0:
            for path in self._entries(commit.COMMITTED)[self.keep :]:
                self._delete(path)
        return final

    def _begin(self, temporary: Path) -> None:
        for path in self._entries(commit.DEBRIS):
            self._delete(path)
        self.directory.mkdir(parents=True, exist_ok=True)
        os.mkdir(temporary)

    def _write_shard(self, directory: Path, save_id: str, engine_state: EngineState) -> dict[str, Any]:
        """Write this rank's slices; -> what the manifest must know of them."""
        file = f"shard-{self.world.rank}-of-{self.world.size}.safetensors"
        entries: list[tuple[str, Tensor]] = []
        parameters: dict[str, Any] = {}
        for name, shards in engine_state.shards.items():
            for part in shards:
                length = part.values[MASTER].numel()
                if length == 0:
                    continue
                stop = part.start + length
                for which, values in part.values.items():
                    if values.dtype != torch.float32 or values.shape != (length,):
                        raise ValueError(f"{which} of {name} is {values.dtype}{list(values.shape)}, not fp32")
                    entries.append((commit.key(name, which, part.start, stop), values.detach()))
                entry = parameters.setdefault(name, {"shape": part.shape, "values": [*part.values], "at": []})
                entry["at"].append([part.start, stop])
        needed = sum(4 * values.numel() for _, values in entries)
        path = directory / file
        try:
            size, digest = commit.write(path, commit.shard(entries, save_id))
            commit.sync_directory(directory)
        except OSError as error:
            raise CheckpointError(_not_written(path, error, needed)) from error
        return {"file": file, "bytes": size, "xxh3_128": digest, "parameters": parameters}

    def _commit(self, temporary: Path, final: Path, manifest: Manifest) -> None:
        """From here on a reader sees the new checkpoint, or none of it."""
        raw = manifest.encode()
        try:
            commit.write(temporary / commit.MANIFEST, [raw])
            commit.sync_directory(temporary)
        except OSError as error:
            raise CheckpointError(_not_written(temporary / commit.MANIFEST, error, len(raw))) from error
        # Checkpoints after the one this run stands on are damaged, or of a future it went back
        # from. They leave first: once this save is visible they must not pass for its successors.
        for path in self._entries(commit.COMMITTED):
            if int(path.name.removeprefix("step-")) > self._step:
                aside = path.with_name(f"{path.name}.aside-{secrets.token_hex(4)}")
                os.rename(path, aside)
                self._say(f"{path} is not part of this run's past; it is now {aside.name}, delete it at will")
        os.rename(temporary, final)
        try:
            commit.sync_directory(self.directory)
            commit.sync_directory(self.directory.parent)
        except OSError:
            os.rename(final, temporary)  # what may not outlive a power cut was not saved
            raise

    # -- opening --------------------------------------------------------------------------------

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None. Collective; damaged ones are skipped, and said.

        Raises `CheckpointError` when it was made with other data or another model than now.
        """
        return self._newest(self.directory)

    def open(self, path: Path) -> Checkpoint:
        """The checkpoint at `path`: a step's directory, or a run's, whose newest it is. Collective.

        Raises `CheckpointError` when it is damaged, missing or of another identity.
        """
        path = Path(path).resolve()
        inside = path / "checkpoints"
        if inside.is_dir() or path == self.directory.resolve():
            found = self._newest(inside if inside.is_dir() else path)
            if found is None:
                raise CheckpointError(f"{path} has no whole checkpoint; give resume=never or another path")
            return found
        return self._verified(path)

    def told(self) -> Manifest | None:
        """What the newest checkpoint says of itself, None where there is none; its shards are not read.

        Collective. Raises `CheckpointError` as `newest` does.
        """
        for path in self._entries(commit.COMMITTED):
            try:
                manifest = Manifest.decode(self._manifest(path).encode("latin-1"))
            except DamagedError as error:
                self._say(f"skipped a damaged checkpoint: {error}")
                continue
            self._expect(path, manifest)
            return manifest
        return None

    def _newest(self, directory: Path) -> Checkpoint | None:
        names = [path.name for path in self._entries(commit.COMMITTED, directory)]
        for name in self.world.broadcast(names):
            try:
                return self._verified(directory / name)
            except DamagedError as error:
                self._say(f"skipped a damaged checkpoint: {error}")
        return None

    def _verified(self, path: Path) -> Checkpoint:
        """Check the manifest on rank 0 and a share of the files on each rank; all ranks agree."""
        manifest = Manifest.decode(self._manifest(path).encode("latin-1"))
        names = sorted(manifest.files)[self.world.rank :: self.world.size]
        mine = [problem for name in names if (problem := commit.damage(path, manifest, name))]
        if problems := [problem for rank in self.world.gather(mine) for problem in rank]:
            raise DamagedError("; ".join(problems))
        self._expect(path, manifest)
        same = path.parent.resolve() == self.directory.resolve()
        self._step = manifest.step if same else -1
        return Checkpoint(path, manifest)

    def _expect(self, path: Path, manifest: Manifest) -> None:
        """Raises `CheckpointError` for a checkpoint of another identity."""
        saved = {name: manifest.identity.get(name) for name in self.identity}
        if differences := list(_differences(saved, self.identity)):
            raise CheckpointError(
                f"{path} belongs to another run: {'; '.join(differences[:5])}. Restore what it was made "
                "with, or begin anew with another run_dir (or resume=never)"
            )

    def _manifest(self, path: Path) -> str:
        """The manifest's bytes as rank 0 reads and approves them, one character a byte."""
        answer: dict[str, str] = {}
        if self.world.rank == 0:
            try:
                raw = commit.read_manifest(path)
                step = Manifest.decode(raw).step
                if path.name != f"step-{step:06d}":
                    raise ValueError(f"it is of step {step}")
                answer = {"raw": raw.decode("latin-1")}
            except (OSError, ValueError) as error:
                answer = {"problem": f"{path / commit.MANIFEST}: {error}"}
        answer = self.world.broadcast(answer)
        if "problem" in answer:
            raise DamagedError(answer["problem"])
        return answer["raw"]

    # -- both -----------------------------------------------------------------------------------

    def _agree(self, work: Callable[[], Any], *, only: int | None = None) -> list[Any]:
        """Do `work` on every rank (or on one) and gather its results.

        A rank that runs into the outside world fails all ranks alike, with the causes of all.
        """
        answer: dict[str, Any] = {}
        try:
            if only is None or self.world.rank == only:
                answer["value"] = work()
        except (CheckpointError, OSError) as error:
            answer["problem"] = str(error)
        answers = self.world.gather(answer)
        problems = [f"rank {r}: {found['problem']}" for r, found in enumerate(answers) if "problem" in found]
        if problems:
            raise CheckpointError("; ".join(problems))
        return [found.get("value") for found in answers]

    def _entries(self, pattern: re.Pattern[str], directory: Path | None = None) -> list[Path]:
        """Directories (no links) with a name like `pattern`, newest step first."""
        try:
            entries = list(os.scandir(directory or self.directory))
        except FileNotFoundError:
            return []
        names = [e.name for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        return [
            Path(directory or self.directory) / name for name in sorted(names, key=_step_of, reverse=True)
        ]

    def _delete(self, path: Path) -> None:
        """Remove a directory; first it loses its committed name, so that half of it is never seen."""
        try:
            if commit.COMMITTED.fullmatch(path.name):
                doomed = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
                os.rename(path, doomed)
                path = doomed
            shutil.rmtree(path)
        except FileNotFoundError:
            pass  # a save that failed before it made its directory
        except OSError as error:
            self._say(f"could not remove {path}: {error.strerror}; delete it by hand to free its space")


class DamagedError(CheckpointError):
    """A checkpoint is incomplete or its content changed: an older one may do."""


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-").split(".")[0])


def _join(written: list[dict[str, Any]]) -> dict[str, Parameter]:
    """Parameters as the manifest lists them, from what each rank wrote.

    Raises `ValueError` unless the ranks cover each element once: a fault of the strategy.
    """
    joined: dict[str, Parameter] = {}
    names = dict.fromkeys(name for part in written for name in part["parameters"])
    for name in names:
        holders = [(part["file"], part["parameters"][name]) for part in written if name in part["parameters"]]
        shapes = {(tuple(entry["shape"]), tuple(entry["values"])) for _, entry in holders}
        if len(shapes) > 1:
            raise ValueError(f"ranks disagree on {name}: {shapes}")
        (shape, values), pieces = shapes.pop(), [(file, a, b) for file, e in holders for a, b in e["at"]]
        joined[name] = Parameter(shape, values, tuple(sorted(pieces, key=lambda piece: piece[1])))
        if {MASTER, FIRST, SECOND} - set(values):
            raise ValueError(f"{name} comes with {values} only")
        if problem := commit.uncovered(joined[name]):
            raise ValueError(f"the slices of {name} {problem}")
    return joined


def _differences(saved: Any, now: Any, where: str = "") -> Iterator[str]:
    """Keys of two trees of mappings that are not equal, with both values."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in sorted(saved.keys() | now.keys()):
            yield from _differences(saved.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif saved != now:
        yield f"{where} was {json.dumps(saved)}, now it is {json.dumps(now)}"


def _not_written(path: Path, error: OSError, needed: int) -> str:
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    return (
        f"{path}: {error.strerror}; the file needs {needed:,} bytes, {free:,} are free there. Free some "
        "space, keep fewer checkpoints (checkpoint.keep), or put run_dir on storage that all hosts share"
    )
