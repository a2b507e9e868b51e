"""Whole runs, as `launch/train.py` carries them out, in the processes that tests share: none is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import workers

from framework.config import work as working
from framework.config.compose import compose


def run(size: int, arguments: Sequence[str]) -> None:
    """A run on `size` ranks, to its end."""
    workers.run(size, work, arguments, timeout_s=180)


def work(world: Any, arguments: Sequence[str]) -> None:
    """What one rank does."""
    with mock.patch.object(working, "_join", return_value=world):  # which stays open for other tests
        assert working.work(compose(arguments)) == 0
