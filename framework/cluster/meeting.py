"""Agreeing before training starts, where some other launcher has made the ranks.

They meet in the key-value store at MASTER_ADDR:MASTER_PORT, long before there is a process group: what
group to make is decided here. What goes wrong on one rank goes wrong on all, so that none is left waiting.
"""

from __future__ import annotations

import json
import os
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

        Raises what `work` raised on rank 0; on the others RefusedElsewhere for a UserError, else SapwoodError.
        """
        if self._store is None:
            return work()
        self._round += 1
        key = f"{self._round}"
        if self._place.rank == 0:
            value, error = _attempt(work)
            self._store.set(key, json.dumps({"value": value, "error": _told(error)}))
            if error is not None:
                raise error
            return value
        answer = json.loads(self._store.get(key))
        _follow(answer["error"], 0)
        return answer["value"]

    def each(self, work: Callable[[], None]) -> None:
        """Run `work` on every rank; return when it has succeeded on all, raise where it failed on any."""
        if self._store is None:
            return work()
        self._round += 1
        _, error = _attempt(work)
        self._store.set(f"{self._round}-{self._place.rank}", json.dumps(_told(error)))
        verdict = f"{self._round}"
        if self._place.rank == 0:
            told = [json.loads(self._store.get(f"{verdict}-{r}")) for r in range(self._place.world_size)]
            failed = [rank for rank, error in enumerate(told) if error is not None]
            self._store.set(verdict, json.dumps([failed[0], told[failed[0]]] if failed else [0, None]))
        rank, first = json.loads(self._store.get(verdict))
        if error is not None:
            raise error
        return _follow(first, rank)


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
