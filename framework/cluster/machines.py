"""The launchers of several machines: they agree before a run, hear from one another, name who is missing.

Each starts the workers of its own machine. What a run is, whether it is done already and how it ended is for
machine 0 to say. Every second each tells machine 0 that it lives, and reads there who does not: a machine
that is cut off ends the others within the time they are told to wait, and a failure at once. Without this a
rank that waits in a collective for a dead one says that it waited, not for whom.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from framework.errors import SapwoodError

if TYPE_CHECKING:  # torch takes seconds to import, and one machine alone needs none of it here
    from torch.distributed import TCPStore

    from framework.cluster.meeting import Meeting

BEAT_S = 1.0  # between two signs of life
RESOLVE_S = 60.0  # a pod's own name is known to it only after a while
SILENT_S = 3.5  # without a sign of life this long a machine is worth naming when something has failed


class MachineLost(SapwoodError):
    """Another machine has failed or is not heard of any more. The message names it."""


class Alone:
    """One machine: whatever it decides is agreed."""

    store: TCPStore | None = None
    rank, count = 0, 1

    def first(self, work: Callable[[], Any]) -> Any:
        return work()

    def each(self, work: Callable[[], None]) -> None:
        work()

    def check(self) -> None:
        pass

    def fail(self, text: str) -> None:
        pass

    def silent(self) -> str:
        return ""


class Machines:
    """The launcher of one machine among those of others. Made by `gathered`."""

    def __init__(self, meeting: Meeting, heartbeat: Heartbeat, *, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.store = meeting.store
        self.first, self.each = meeting.first, meeting.each  # as there, among machines
        self.check = heartbeat.check  # raises MachineLost
        self.fail = heartbeat.fail
        self.silent = heartbeat.silent


@contextmanager
def gathered(
    *, rank: int, count: int, address: str | None, port: int | None, timeout_s: float
) -> Iterator[Machines | Alone]:
    """All machines, once each has come; machine 0 hosts the store at `address`:`port` until the end.

    `timeout_s` bounds the wait for a machine to come, and later for a sign of life. Raises MachineLost.
    """
    if count == 1:
        yield Alone()
        return
    assert address is not None
    assert port is not None
    if rank == 0:
        _resolve(address, min(timeout_s, RESOLVE_S))
    else:
        _reach(address, port, timeout_s)

    from framework.cluster.environ import Place
    from framework.cluster.meeting import Meeting

    place = Place(rank, count, 0, 1, rank, "machines", address, port)
    heartbeat = Heartbeat(rank, count, address, port, timeout_s=timeout_s)
    where = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    try:
        meeting = Meeting(place, where, arrival_s=timeout_s, check=heartbeat.check, who="machine")
    except OSError as error:
        raise MachineLost(
            f"{address}:{port}: cannot listen there ({error.strerror}); expected an address of this machine "
            "and a free port; type launch.master_addr=HOST launch.master_port=PORT, the same on all machines"
        ) from error
    heartbeat.start()
    try:
        yield Machines(meeting, heartbeat, rank=rank, count=count)
    except BaseException:
        heartbeat.stop(failed=True)
        raise
    heartbeat.stop()


class Heartbeat:
    """Signs of life of the launchers. A thread of its own talks to the store, for a cut link holds it up.

    Machine 0 sees who is silent and publishes it; the others see whether machine 0 answers, and read that.
    """

    def __init__(self, rank: int, count: int, address: str, port: int, *, timeout_s: float) -> None:
        self._rank, self._count = rank, count
        self._where = (address, port)
        self._timeout_s = timeout_s
        self._stopped = threading.Event()
        self._failure = ""  # of this machine, to be told
        self._told = threading.Event()
        self._names: dict[int, str] = {}
        self._heard: dict[int, tuple[str, float]] = {}  # machine -> its last beat, and when it came
        self._ages: dict[int, float] = {}  # machine -> seconds of silence, as machine 0 sees it
        self._failures: dict[int, str] = {}
        self._answered = time.monotonic()  # when machine 0 last did
        self._gone = ""  # why the thread gave up
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, failed: bool = False) -> None:
        """End the thread. After a failure machine 0, which holds the store, lingers until the others know."""
        if failed and self._rank == 0:
            time.sleep(2 * BEAT_S)
        self._stopped.set()
        self._thread.join(2 * BEAT_S)

    def check(self) -> None:
        """Raise MachineLost if another machine has failed, or was silent for `timeout_s`."""
        failed = {rank: text for rank, text in self._failures.items() if rank != self._rank}
        if failed:
            raise MachineLost(
                "\n".join(f"{self._name(rank)} failed: {text}" for rank, text in failed.items())
            )
        if self._gone and self._rank != 0:
            raise MachineLost(f"{self._name(0)} has ended: {self._gone}")
        lost = {rank: age for rank, age in self._silences().items() if age >= self._timeout_s}
        if lost:
            raise MachineLost(
                f"{self._worded(lost)}, and launch.timeout_s={self._timeout_s:g} is over: ended here. "
                "The same command on all machines goes on from the newest checkpoint"
            )

    def silent(self) -> str:
        """Who is not heard of right now, as a line for people; empty where all are."""
        now = {rank: age for rank, age in self._silences().items() if age >= SILENT_S}
        return self._worded(now) if now else ""

    def fail(self, text: str) -> None:
        """Tell the others, as soon as can be, that this machine has failed."""
        self._failure = text
        self._told.wait(2 * BEAT_S)

    def _silences(self) -> dict[int, float]:
        now = time.monotonic()
        if self._rank == 0:
            return {rank: now - when for rank, (_, when) in sorted(self._heard.items())}
        silence = now - self._answered
        if silence >= SILENT_S:  # what machine 0 said before is of no use now
            return {0: silence}
        return {rank: age for rank, age in self._ages.items() if rank != self._rank}

    def _worded(self, ages: Mapping[int, float]) -> str:
        names = ", ".join(self._name(rank) for rank in ages)
        return (
            f"of {self._count} machines, {names} {'has' if len(ages) == 1 else 'have'} not been heard of for "
            f"{max(ages.values()):.0f} s"
        )

    def _name(self, rank: int) -> str:
        host = self._names.get(rank, "never came" if self._rank == 0 else "")
        if rank == 0:
            host = "{}:{}".format(*self._where)
        return f"machine {rank}" + (f" ({host})" if host else "")

    def _run(self) -> None:
        from torch.distributed import PrefixStore, TCPStore

        try:
            waiting = timedelta(seconds=self._timeout_s)
            store = PrefixStore("machines", TCPStore(*self._where, is_master=False, timeout=waiting))
            others = range(1, self._count)
            if self._rank == 0:
                for rank in others:
                    self._heard[rank] = ("", time.monotonic())
                    store.compare_set(f"beat-{rank}", "", json.dumps(["", ""]))
                for rank in range(self._count):
                    store.compare_set(f"failed-{rank}", "", json.dumps(""))
                store.set("seen", json.dumps([{}, {}, {}]))
            beat = 0
            while not self._stopped.is_set():
                beat += 1
                store.set(f"beat-{self._rank}", json.dumps([str(beat), socket.gethostname()]))
                if self._failure and not self._told.is_set():
                    store.set(f"failed-{self._rank}", json.dumps(self._failure))
                    store.get("seen")  # the line above has been read before this one is
                    self._told.set()
                if self._rank == 0:
                    self._listen(store)
                else:
                    self._read(store)
                pause = time.monotonic() + BEAT_S
                while time.monotonic() < pause and not self._stopped.wait(0.05):
                    if self._failure and not self._told.is_set():
                        break
        except Exception as error:  # the store went with machine 0
            self._gone = str(error).partition("\n")[0]

    def _listen(self, store: Any) -> None:
        """Machine 0: take the others' beats, and publish what they come to."""
        others = list(self._heard)
        beats = store.multi_get([f"beat-{rank}" for rank in others])
        failures = store.multi_get([f"failed-{rank}" for rank in range(self._count)])
        now = time.monotonic()
        for rank, text in zip(others, beats, strict=True):
            beat, host = json.loads(text)
            if beat != self._heard[rank][0]:
                self._heard[rank] = (beat, now)
                self._names[rank] = host
        self._failures = {rank: said for rank, text in enumerate(failures) if (said := json.loads(text))}
        ages = {rank: now - when for rank, (_, when) in self._heard.items()}
        store.set("seen", json.dumps([ages, self._failures, self._names]))

    def _read(self, store: Any) -> None:
        """Another machine: what machine 0 has published, and that it answers at all."""
        ages, failures, names = (
            {int(rank): value for rank, value in part.items()} for part in json.loads(store.get("seen"))
        )
        self._ages, self._failures, self._names = ages, failures, names
        self._answered = time.monotonic()


def _resolve(address: str, patience_s: float) -> None:
    """Wait until machine 0 knows its own name. Raises MachineLost where that leads to no other machine."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            found = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise MachineLost(
                    f"launch.master_addr={address}: {error.strerror} on this machine, which is machine 0; "
                    "expected its own name or address"
                ) from error
            time.sleep(0.5)
            continue
        if found.startswith("127.") and address not in (found, "localhost"):  # as Debian's /etc/hosts has it
            raise MachineLost(
                f"launch.master_addr={address} is {found} on machine 0, where no other machine reaches it; "
                "type launch.master_addr=ADDRESS, the one that the others see"
            )
        return


def _reach(address: str, port: int, timeout_s: float) -> None:
    """Wait until machine 0 listens. Raises MachineLost."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise MachineLost(
                    f"machine 0 ({address}:{port}) has not answered for {timeout_s:g} s ({error}); expected "
                    "the same command there with launch.node_rank=0, and that port open to this machine "
                    f"({socket.gethostname()})"
                ) from error
            time.sleep(0.2)
