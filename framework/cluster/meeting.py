"""Agreeing before training starts, where some other launcher has made the ranks.

They meet in the key-value store at MASTER_ADDR:MASTER_PORT, long before there is a process group: what
group to make is decided here. What goes wrong on one rank goes wrong on all, so that none is left waiting.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from framework.cluster.environ import Place
from framework.cluster.worker import RefusedElsewhere
from framework.errors import SapwoodError, UserError
from framework.strategy.world import host_store

PATIENCE = timedelta(days=1)  # for reading and tokenising; a launcher ends those who wait for a dead rank


class Meeting:
    """All ranks call the same methods in the same order. Keep it: on rank 0 it may hold the store.

    `arrival_s` bounds the wait for the store to be there.
    """

    def __init__(
        self, place: Place, environment: MutableMapping[str, str] = os.environ, *, arrival_s: float = 600.0
    ) -> None:
        self._place = place
        self._arrival_s = arrival_s
        self._round = 0
        self._store: Store | None = None
        if place.world_size == 1:
            return
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        arrival = timedelta(seconds=arrival_s)
        if place.rank == 0 and not hosted:
            store = host_store(address, port, timeout=arrival)
        else:
            store = TCPStore(address, port, is_master=False, timeout=arrival)
        store.set_timeout(PATIENCE)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the process group finds it there, too
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"meeting-{attempt}", store)

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, as JSON, on every rank; it runs there only.

        Raises what `work` raised on rank 0; on the others RefusedElsewhere where that was a UserError,
        else SapwoodError.
        """
        if self._store is None:
            return work()
        if self._place.rank == 0:
            value, error = _attempt(work)
            self._spread(self._store, {"value": value, "error": _told(error)})
            if error is not None:
                raise error
            return value
        answer = self._spread(self._store, None)
        _follow(answer["error"], 0)
        return answer["value"]

    def each(self, work: Callable[[], None]) -> None:
        """Run `work` on every rank; return when it has succeeded on all, raise where it failed on any."""
        if self._store is None:
            return work()
        _, error = _attempt(work)
        told = f"told-{self._round}-"
        self._store.set(f"{told}{self._place.rank}", json.dumps(_told(error)))
        verdict: list[Any] = [0, None]
        if self._place.rank == 0:
            for rank in reversed(range(self._place.world_size)):
                said = json.loads(self._store.get(f"{told}{rank}"))
                verdict = verdict if said is None else [rank, said]
        rank, first = self._spread(self._store, verdict)
        if error is not None:
            raise error
        _follow(first, rank)

    def _spread(self, store: Store, value: Any) -> Any:
        """Rank 0's value on all ranks. It stays until all have read it: with it the store may go."""
        key, read = f"value-{self._round}", f"read-{self._round}"
        self._round += 1
        if self._place.rank != 0:
            value = json.loads(store.get(key))
            store.add(read, 1)
            return value
        store.set(key, json.dumps(value))
        deadline = time.monotonic() + self._arrival_s
        while store.add(read, 0) < self._place.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        return value


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _told(error: Exception | None) -> list[Any] | None:
    return None if error is None else [isinstance(error, UserError), f"{type(error).__name__}: {error}"]


def _follow(error: list[Any] | None, rank: int) -> None:
    if error is not None:
        refused, text = error
        if refused:
            raise RefusedElsewhere(text)
        raise SapwoodError(f"rank {rank} failed before training: {text}")
