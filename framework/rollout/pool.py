"""Rewards in processes of their own: bounded in time and memory, ended and replaced when they misbehave.

A reward is one Python function, named by its dotted path and imported in a fresh process without this
process's environment; it says of each answer a finite number, or it has failed in one of four ways. This
bounds accidents: it is no sandbox for code that means harm. Knows no model and no task.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.errors import ConfigError, SapwoodError

TIMEOUT, CRASH, EXCEPTION, NOT_A_NUMBER = KINDS = ("timeout", "crash", "exception", "not_a_number")
SUPPLIED = ("answer", "row", "tokens", "finished", "answers", "rows")
"""What a reward may ask for by parameter name; see `Pool`."""

LONGEST_LINE = 1 << 20  # bytes of an answer from a process; more is garbage
START_S = 120.0  # imports may be slow on a busy machine
GONE_S = 5.0  # longest wait for the kernel to take away what was killed
BATCH = 32  # answers in a call of a batched reward: a failed call fails them all


@dataclass(frozen=True)
class Limits:
    """What one call of a reward may take."""

    timeout_s: float = 10.0
    memory_bytes: int = 2 << 30  # address space beyond what importing the reward took


@dataclass(frozen=True)
class Question:
    """One answer to be judged."""

    answer: str  # the text, special tokens removed
    row: Mapping[str, Any]  # of the data; what JSON cannot hold arrives as its text
    tokens: int = 0  # in the answer
    finished: bool = True  # whether it ended by itself


@dataclass(frozen=True)
class Verdicts:
    """What a reward said."""

    values: list[float]  # [N], NaN where it failed
    failures: Counter[str] = field(default_factory=Counter)  # answers by kind of failure, see KINDS
    first: str = ""  # what was seen of the first failure: a traceback where there is one


class Pool:
    """Processes that judge answers with the function `target` ("package.module.function").

    The function asks for what it needs by parameter name: `answer` (str), `row` (mapping), `tokens` (int,
    length of the answer), `finished` (bool); it returns a number. One that names `answers` and `rows`
    judges several at once: each of these, `tokens` and `finished` too, is then a list, and so is what it
    returns. `keywords` fill its other parameters. Found on this process's `sys.path`. A class is made once a
    process, with `keywords`, and its method `score` is the function.
    """

    def __init__(
        self, target: str, keywords: Mapping[str, Any], *, workers: int = 1, limits: Limits = Limits()
    ) -> None:
        self.target, self.limits = target, limits
        self.hello = {"target": target, "keywords": dict(keywords), "memory_bytes": limits.memory_bytes}
        self.workers = workers
        self._living: list[_Worker] = []
        weakref.finalize(self, _end_all, self._living)
        self.batched: bool | None = None

    def judge(self, questions: Sequence[Question]) -> Verdicts:
        """The reward of each answer. A call that fails in any way gives NaN, and is counted.

        Raises ConfigError where the function cannot be imported or is not given what it needs.
        """
        if not questions:
            return Verdicts([])
        self._start()
        size = BATCH if self.batched else 1
        waiting = deque(
            range(start, min(start + size, len(questions))) for start in range(0, len(questions), size)
        )
        verdicts = Verdicts([math.nan] * len(questions))
        seen: list[tuple[int, str]] = []
        while waiting or any(worker.call for worker in self._living):
            for place, worker in enumerate(self._living):
                if worker.call is None and waiting:
                    if worker.dead:
                        worker = self._living[place] = self._opened(_Worker(self.hello))
                    part = waiting.popleft()
                    worker.ask(part, _inputs(questions, part, bool(self.batched)), self.limits.timeout_s)
            for worker, outcome in _wait([worker for worker in self._living if worker.call]):
                assert worker.call is not None
                part, worker.call = worker.call, None
                if worker.dead:
                    worker.end()
                self._enter(verdicts, seen, part, outcome)
        seen.sort()
        return Verdicts(verdicts.values, verdicts.failures, seen[0][1] if seen else "")

    def close(self) -> None:
        """End all processes and what they have started."""
        _end_all(self._living)

    def _start(self) -> None:
        if self._living:
            return
        self._living.extend(_Worker(self.hello) for _ in range(self.workers))
        for worker in self._living:
            self._opened(worker)

    def _opened(self, worker: _Worker) -> _Worker:
        """`worker`, once it has imported the reward."""
        try:
            said = worker.ready()
            expected = f"expected a function that takes some of {', '.join(SUPPLIED)}"
            if "problem" in said:
                raise ConfigError(f"reward {self.target} cannot be used; {expected}:\n{said['problem']}")
            if strange := [name for name in said["needed"] if name not in SUPPLIED]:
                raise ConfigError(
                    f"reward {self.target} needs {', '.join(strange)}, which is not set; {expected}, and its "
                    "other parameters from the configuration"
                )
        except BaseException:
            worker.end()
            self.close()
            raise
        self.batched = "answers" in said["ready"]
        return worker

    def _enter(
        self, verdicts: Verdicts, seen: list[tuple[int, str]], part: range, outcome: tuple[str, Any]
    ) -> None:
        kind, said = outcome
        if kind == "values":
            for place, value in zip(part, said["values"], strict=True):
                if value is None:
                    verdicts.failures[NOT_A_NUMBER] += 1
                else:
                    verdicts.values[place] = value
            if said["strange"]:
                seen.append((part.start, said["strange"]))
        else:
            verdicts.failures[kind] += len(part)
            seen.append((part.start, said))


class _Worker:
    """One process, the socket to it and the call it is at work on."""

    def __init__(self, hello: Mapping[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        self.home = tempfile.mkdtemp(prefix="sapwood-reward-")
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("pool_worker.py")), str(theirs.fileno())],
            env=_environment(self.home),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # so that what it forks can be ended with it
        )
        theirs.close()
        ours.setblocking(False)
        self.socket = ours
        self.ended = os.pidfd_open(self.process.pid)  # readable when the process is gone
        self.call: range | None = None
        self.number = 0  # of the last call: answers to others are not listened to
        self.deadline = time.monotonic() + START_S
        self.outgoing = _line({**hello, "path": [str(Path(entry).resolve()) for entry in sys.path]})
        self.incoming = b""
        self.dead = False

    def ready(self) -> Mapping[str, Any]:
        """What it says after importing the reward: {"ready": parameter names} or {"problem": traceback}."""
        self.call = range(0)
        try:
            while True:
                for _, (kind, said) in _wait([self]):
                    if kind != "said":
                        raise SapwoodError(f"a process for rewards did not start: {said}")
                    answer: Mapping[str, Any] = said
                    return answer
        finally:
            self.call = None

    def ask(self, part: range, inputs: Mapping[str, Any], timeout_s: float) -> None:
        """Begin a call."""
        self.call, self.number = part, self.number + 1
        self.deadline = time.monotonic() + timeout_s
        call = {"id": self.number, "inputs": inputs, "count": len(part), "timeout_s": timeout_s}
        self.outgoing = _line(call)

    def write(self) -> None:
        """Send what fits."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            self.outgoing = self.outgoing[self.socket.send(self.outgoing) :]

    def read(self) -> tuple[str, Any] | None:
        """Take what has come; the outcome of the call, when that is in it."""
        try:
            came = self.socket.recv(1 << 16)
        except ConnectionError:
            came = b""
        except BlockingIOError:
            return None
        if not came:
            gone, _, _ = select.select([self.ended], [], [], 1.0)
            return self.gone() if gone else self.fail(CRASH, "it closed its connection")
        self.incoming += came
        while b"\n" in self.incoming:
            line, _, self.incoming = self.incoming.partition(b"\n")
            try:
                said = json.loads(line)
                ready = "ready" in said or ("problem" in said and "id" not in said)
                if not ready and said["id"] != self.number:
                    continue  # a process that it forked, or that a late call left behind
                if ready:
                    return "said", said
                if "problem" in said:
                    return EXCEPTION, str(said["problem"])
                values = [None if v is None else float(v) for v in said["values"]]
                if self.call is None or len(values) != len(self.call):
                    raise ValueError("another number of values")
                return "values", {"values": values, "strange": said["strange"]}
            except (ValueError, TypeError, KeyError, AttributeError):
                return self.fail(CRASH, f"it sent what is no answer: {line[:200]!r}")
        if len(self.incoming) > LONGEST_LINE:
            return self.fail(CRASH, f"it sent {len(self.incoming)} bytes that are no answer")
        return None

    def gone(self) -> tuple[str, Any]:
        """The outcome of a call whose process has ended."""
        status = os.waitid(os.P_PIDFD, self.ended, os.WEXITED | os.WNOWAIT)
        assert status is not None
        how = f"exit status {status.si_status}"
        if status.si_code != os.CLD_EXITED:
            how = f"signal {signal.Signals(status.si_status).name}"
        return self.fail(CRASH, f"its process ended by itself ({how})")

    def fail(self, kind: str, seen: str) -> tuple[str, str]:
        """The outcome of a call after which this process is not used again."""
        self.dead = True
        return kind, seen

    def end(self) -> None:
        """End the process and all that it has started, as far as that stayed in its group. Once."""
        if self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        _until_gone(self.process.pid)
        os.close(self.ended)
        self.socket.close()
        shutil.rmtree(self.home, ignore_errors=True)


def _wait(workers: Sequence[_Worker]) -> list[tuple[_Worker, tuple[str, Any]]]:
    """Wait until something happens to calls; those that have an outcome now."""
    outcomes: list[tuple[_Worker, tuple[str, Any]]] = []
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            wants = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
            selector.register(worker.socket, wants, worker)
            selector.register(worker.ended, selectors.EVENT_READ, worker)
        patience = min(worker.deadline for worker in workers) - time.monotonic()
        happened: dict[int, list[tuple[Any, int]]] = {}
        for key, events in selector.select(max(0.0, patience)):
            happened.setdefault(id(key.data), []).append((key.fileobj, events))
    now = time.monotonic()
    for worker in workers:
        outcome = None
        about = dict(happened.get(id(worker), []))
        on_socket = about.get(worker.socket, 0)
        if on_socket & selectors.EVENT_WRITE:
            worker.write()
        if on_socket & selectors.EVENT_READ:
            outcome = worker.read()
        if outcome is None and worker.ended in about and not on_socket & selectors.EVENT_READ:
            outcome = worker.gone()
        if outcome is None and now >= worker.deadline:
            outcome = worker.fail(TIMEOUT, "it did not answer in time")
        if outcome is not None:
            outcomes.append((worker, outcome))
    return outcomes


def _inputs(questions: Sequence[Question], part: range, batched: bool) -> dict[str, Any]:
    asked = [questions[place] for place in part]
    if not batched:
        one = asked[0]
        return {"answer": one.answer, "row": one.row, "tokens": one.tokens, "finished": one.finished}
    return {
        "answers": [q.answer for q in asked],
        "rows": [q.row for q in asked],
        "tokens": [q.tokens for q in asked],
        "finished": [q.finished for q in asked],
    }


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, default=str).encode() + b"\n"


def _environment(home: str) -> dict[str, str]:
    """Enough to run Python quietly; no token, key or address of this process."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **quiet, "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"}


def _until_gone(group: int) -> None:
    """Wait for the processes of a killed group: its leader was waited for, and what that forked is not ours
    to wait for. Without a /proc, as soon as the leader is gone."""
    deadline = time.monotonic() + GONE_S
    while _alive(group) and time.monotonic() < deadline:
        time.sleep(0.005)


def _alive(group: int) -> bool:
    """Whether a process of the group runs; one that only waits to be reaped does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                return True
    return False


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
