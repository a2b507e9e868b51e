"""A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656).

Every k steps the frozen copy becomes a * policy + (1 - a) * reference, parameter by parameter in fp32.
What it then is follows from no checkpoint of the policy, so every refresh is kept on disk for a resume.
Knows weights by name, no loss.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from framework.errors import CheckpointError
from framework.strategy.base import Engine, Frozen

MANIFEST = "manifest.json"  # {parameter name: [file, xxh3-128 of its numbers]}

Named = Iterator[tuple[str, Tensor]]


class Moving:
    """Refreshes `frozen` from `engine` before every step that `every` divides, step 0 excepted.

    `mix` is a in (0, 1]: the paper's soft update, 1 its hard one. `directory` must be shared by all hosts
    and belong to this run; `keep` is how many checkpoints the run keeps, and refreshes that none of them
    needs are removed. For full training only: the mean of two adapters' factors is not the mean of their
    products. Raises ValueError for numbers out of range.
    """

    def __init__(
        self, frozen: Frozen, engine: Engine, *, every: int, mix: float, directory: Path, keep: int
    ) -> None:
        if every < 1 or not 0 < mix <= 1:
            raise ValueError(f"every={every} must be at least 1 and mix={mix} in (0, 1]")
        self.frozen, self.engine = frozen, engine
        self.every, self.mix = every, mix
        self.directory, self.keep = Path(directory), keep
        self.refreshed = 0  # the step before which the reference last moved
        self._needed: list[int] = []  # `refreshed` at the newest checkpoints

    def advance(self, step: int) -> bool:
        """Move if it is time to; whether the reference is another one now. Collective.

        Raises CheckpointError, on all ranks, when what it became cannot be kept on disk.
        """
        if step == 0 and self.mix < 1:  # the start model is what the first refresh mixes in
            self._keep(0, self.engine.weights(), take=_exhaust)
        if step == 0 or step % self.every:
            return False
        self._keep(step, self._mixed(), take=self.frozen.refill)
        self.refreshed = step
        if self.engine.world.rank == 0:
            for path in self.directory.glob("step-*"):
                if path.name not in {_name(s) for s in [*self._needed, step]}:
                    shutil.rmtree(path, ignore_errors=True)
        return True

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the refresh it needs, and those that the ones before it need."""
        self._needed = [*self._needed, self.refreshed][-self.keep - 1 :]
        return {"refreshed": self.refreshed, "needed": list(self._needed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what the reference was. Collective. Raises CheckpointError when that was not kept."""
        self.refreshed, self._needed = int(state["refreshed"]), [int(step) for step in state["needed"]]
        if self.refreshed > 0:
            kept = _Kept(self.directory / _name(self.refreshed))
            trained = self.engine.trained
            weights = self.engine.weights()
            self.frozen.refill((name, kept[name] if name in trained else value) for name, value in weights)

    def _mixed(self) -> Named:
        old = _Kept(self.directory / _name(self.refreshed)) if self.mix < 1 else None
        for name, value in self.engine.weights():
            if old is not None and name in self.engine.trained:
                value = self.mix * value.float() + (1 - self.mix) * old[name].to(value.device)
            yield name, value

    def _keep(self, step: int, weights: Named, *, take: Callable[[Named], None]) -> None:
        """Hand `weights` to `take`, rank 0 writing down what is trained as it passes. Collective."""
        world = self.engine.world
        directory = self.directory / _name(step)
        building = directory.with_name(directory.name + ".building")
        problems: list[str] = []
        entries: dict[str, tuple[str, str]] = {}

        def written() -> Named:
            for name, value in weights:
                if world.rank == 0 and name in self.engine.trained and not problems:
                    try:
                        file = f"{len(entries)}.safetensors"
                        whole = value.detach().float().cpu().contiguous()
                        save_file({"value": whole}, building / file)
                        entries[name] = file, _hash(whole)
                    except (OSError, SafetensorError) as error:
                        problems.append(str(error))
                yield name, value

        if world.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
        take(written())
        if world.rank == 0 and not problems:
            try:
                (building / MANIFEST).write_text(json.dumps(entries))
                shutil.rmtree(directory, ignore_errors=True)  # of a run that went back before this step
                os.rename(building, directory)
            except OSError as error:
                problems.append(str(error))
        problems = world.broadcast(problems)
        if problems:
            raise CheckpointError(f"the reference after step {step} cannot be kept: {problems[0]}")


class _Kept:
    """The parameters of one refresh by name, read one at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self._entries: dict[str, tuple[str, str]] = json.loads((directory / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{directory}: the reference of this checkpoint is gone ({error}); go on from another one "
                "with resume=PATH, or begin anew with resume=never"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        file, digest = self._entries[name]
        try:
            value = load_file(self.directory / file)["value"]
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{self.directory / file} cannot be read: {error}") from error
        if _hash(value) != digest:
            raise CheckpointError(f"{self.directory / file} is not as it was written")
        return value


def _hash(value: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(value.numpy().tobytes())


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _exhaust(weights: Iterable[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass
