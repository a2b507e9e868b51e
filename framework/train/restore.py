"""Reads a verified checkpoint back: any slice of any parameter, whatever ranks and strategy wrote it.

`checkpoint` finds and verifies; nothing here decides which checkpoint is good.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.errors import CheckpointError
from framework.train import commit
from framework.train.commit import Manifest, Parameter


class Checkpoint:
    """A checkpoint whose every file was verified against its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.step = manifest.step  # optimizer steps done
        self.updates = manifest.updates  # optimizer updates applied
        self.state = manifest.state  # what the trainer gave to `save`
        self.identity = manifest.identity
        self.world_size = manifest.world_size  # ranks that wrote it
        self.parameters: Mapping[str, Parameter] = manifest.parameters
        self._open: dict[str, Any] = {}  # file name -> its memory-mapped reader

    def expect(self, trained: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `CheckpointError` unless the trained parameters are exactly these, shape by shape.

        Call before the first `read`: nothing of the model has changed then.
        """
        saved = {name: parameter.shape for name, parameter in self.parameters.items()}
        now = {name: tuple(shape) for name, shape in trained.items()}
        problems = [
            _listed("is trained now but is not in the checkpoint", sorted(now.keys() - saved.keys())),
            _listed("is in the checkpoint but is not trained now", sorted(saved.keys() - now.keys())),
            *(
                f"{name} was saved as {list(saved[name])}, now it is {list(now[name])}"
                for name in sorted(now.keys() & saved.keys())
                if saved[name] != now[name]
            ),
        ]
        if found := [problem for problem in problems if problem]:
            raise CheckpointError(
                f"{self.path} does not fit the model: {'; '.join(found[:3])}. Go on with the model and "
                "adapter it was saved with, or begin anew with resume=never"
            )

    def read(self, name: str, which: str, start: int, stop: int) -> Tensor:
        """Elements start..stop-1 of a flattened value of a parameter, [stop - start] fp32, exact.

        `which` is "master", "exp_avg" or "exp_avg_sq". Reads no more of the files than asked, and
        the result is the caller's own. Raises `CheckpointError` for what is not in the checkpoint.
        """
        parameter = self.parameters.get(name)
        if parameter is None or which not in parameter.values:
            raise CheckpointError(f"{self.path} has no {which} of {name}")
        pieces = parameter.pieces
        total = pieces[-1][2] if pieces else 0
        if not 0 <= start <= stop <= total:
            raise CheckpointError(f"{self.path} has {total} elements of {name}, asked for {start}..{stop}")
        out = torch.empty(stop - start)
        i = bisect_right(pieces, start, key=lambda piece: piece[1]) - 1
        at = start
        while at < stop:
            file, first, last = pieces[i]
            end = min(stop, last)
            part = self._slice(file, commit.key(name, which, first, last), at - first, end - first)
            out[at - start : end - start] = part
            at, i = end, i + 1
        return out

    def _slice(self, file: str, key: str, start: int, stop: int) -> Tensor:
        """A view of the mapped file, valid while it stays as it is: copy it at once."""
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, framework="pt")
            return self._open[file].get_slice(key)[start:stop]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / file} cannot be read: {error}") from error


def _listed(problem: str, names: list[str]) -> str:
    """Names with what is wrong with them, the first three spelled out; "" for none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {problem}" if names else ""
