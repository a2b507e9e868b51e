"""Agreeing before training starts, where some other launcher has made the ranks.

They meet in the key-value store at MASTER_ADDR:MASTER_PORT, long before there is a process group: what
group to make is decided here. What goes wrong on one rank goes wrong on all, so that none is left waiting.
The launchers of several machines agree in the same way (`machines`).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore

from framework.cluster.environ import Place
from framework.cluster.worker import RefusedElsewhere
from framework.errors import SapwoodError, UserError
from framework.strategy.world import host_store

PATIENCE = timedelta(days=1)  # for reading and tokenising; a launcher ends those who wait for a dead rank
LOOK_S = 0.1  # between two looks whether waiting is in vain


class Meeting:
    """All participants call the same methods in the same order. Keep it: on rank 0 it may hold the store.

    `arrival_s` bounds the wait for the store to be there, `check` is called again and again while waiting and
    raises where that is in vain, `who` is what a participant is called in errors.
    """

    def __init__(
        self,
        place: Place,
        environment: MutableMapping[str, str] = os.environ,
        *,
        arrival_s: float = 600.0,
        check: Callable[[], None] | None = None,
        who: str = "rank",
    ) -> None:
        self.store: TCPStore | None = None  # where they meet; None in a world of one
        self._place = place
        self._arrival_s = arrival_s
        self._check = check
        self._who = who
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
        self.store = store
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
        self._follow(answer["error"], 0)
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
                said = json.loads(self._get(self._store, f"{told}{rank}"))
                verdict = verdict if said is None else [rank, said]
        rank, first = self._spread(self._store, verdict)
        if error is not None:
            raise error
        self._follow(first, rank)

    def _spread(self, store: Store, value: Any) -> Any:
        """Rank 0's value on all ranks. It stays until all have read it: with it the store may go."""
        key, read = f"value-{self._round}", f"read-{self._round}"
        self._round += 1
        if self._place.rank != 0:
            value = json.loads(self._get(store, key))
            store.add(read, 1)
            return value
        store.set(key, json.dumps(value))
        deadline = time.monotonic() + self._arrival_s
        while store.add(read, 0) < self._place.world_size - 1:
            if self._check is not None:
                self._check()
            elif time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return value

    def _get(self, store: Store, key: str) -> bytes:
        """What somebody sets, as soon as it is there.

        With `check` it is waited for in a thread: nothing else gets away from a socket whose link is cut.
        """
        if self._check is None:
            return store.get(key)
        answer: list[bytes | Exception] = []

        def wait() -> None:
            try:
                answer.append(store.get(key))
            except Exception as error:
                answer.append(error)

        thread = threading.Thread(target=wait, name="meeting", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_S)
            self._check()
        if isinstance(answer[0], DistNetworkError):
            raise SapwoodError(f"{self._who} 0 has ended while this one waited for it") from answer[0]
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _follow(self, error: list[Any] | None, rank: int) -> None:
        if error is not None:
            refused, text = error
            if refused:
                raise RefusedElsewhere(text)
            raise SapwoodError(f"{self._who} {rank} failed before training: {text}")


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _told(error: Exception | None) -> list[Any] | None:
    return None if error is None else [isinstance(error, UserError), f"{type(error).__name__}: {error}"]
