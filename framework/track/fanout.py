"""One tracker over many. A tracker that fails is named once and dropped; the others and the run go on.

`Fanout([])` records nothing: it is the tracker of every rank but 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from framework.track.base import Tracker


class Fanout:
    """Passes every record on to each of `trackers`, in order. `say` gets the notice of a failure."""

    def __init__(
        self,
        trackers: Iterable[Tracker],
        *,
        say: Callable[[str], None] = logging.getLogger(__name__).warning,
    ) -> None:
        self._trackers = list(trackers)
        self._say = say

    def log(self, kind: str, metrics: Mapping[str, Any], *, step: int) -> None:
        self._each(lambda tracker: tracker.log(kind, metrics, step=step))

    def artifact(self, path: Path, *, kind: str) -> None:
        self._each(lambda tracker: tracker.artifact(path, kind=kind))

    def close(self, status: str) -> None:
        self._each(lambda tracker: tracker.close(status))

    def _each(self, pass_on: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                pass_on(tracker)
            except Exception as error:  # whatever it is, no record is worth the run
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                self._say(f"{name} records no more from here on; the run goes on: {error!r}")
