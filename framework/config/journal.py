"""What was written of a stream so far, wave by wave in one file; half a line counts as not there.

So whoever is killed while writing goes on after the last whole wave, and more rows of the same stream are
the same ones and some more.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wave:
    """Some drafts that were gone through together."""

    tried: int
    rows: tuple[Mapping[str, Any], ...] = ()  # kept, in order
    dropped: Mapping[str, int] = field(default_factory=dict)  # by reason


class Journal:
    """The waves of the stream that `path` is named after."""

    def __init__(self, path: Path, waves: Sequence[Wave] | None = None) -> None:
        """`waves` are those that another process has read there."""
        self.path = path
        self.waves = list(_read(path) if waves is None else waves)

    @property
    def tried(self) -> int:
        return sum(wave.tried for wave in self.waves)

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        return [row for wave in self.waves for row in wave.rows]

    @property
    def dropped(self) -> Counter[str]:
        return sum((Counter(wave.dropped) for wave in self.waves), Counter())

    def note(self, wave: Wave) -> None:
        """Take a wave in, without writing it."""
        self.waves.append(wave)

    def write(self, wave: Wave) -> None:
        """Append the newest wave to the file, for its owner to read."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(handle, "r+b") as file:
            file.truncate(_whole(file.read()))  # a line of a process that was killed in it
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(vars(wave), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> list[Wave]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = text[: _whole(text)].decode().splitlines()
    return [_wave(json.loads(line)) for line in lines]


def _wave(line: Mapping[str, Any]) -> Wave:
    return Wave(line["tried"], tuple(line["rows"]), line["dropped"])


def _whole(text: bytes) -> int:
    """Bytes up to the end of the last whole line."""
    return text.rfind(b"\n") + 1
