"""The frame around one rank's work: it dies with its launcher, tells why it failed, and exits.

Used under our own gang, torchrun and deepspeed alike; knows nothing of what the work is.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from framework.cluster import environ
from framework.errors import DONE, INTERRUPTED, REFUSED, SapwoodError, UserError

PR_SET_PDEATHSIG = 1  # prctl(2): signal to get when the parent ends

FAILED = 1  # exit status: anything that was not foreseen


class RefusedElsewhere(UserError):
    """Another rank refused and has said why; this one only follows it out."""


class WorkerFailed(SapwoodError):
    """A rank failed. The message names it, its log and what it said; `status` is its exit status."""

    def __init__(self, message: str, *, rank: int, status: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.status = status  # -N for a rank that was ended by signal N


def run(work: Callable[[], int]) -> NoReturn:
    """End the process with the status that `work` returns, or with the one its exception calls for.

    UserError ends with status 2, anything else with 1; errors of ours with their message, others with a
    traceback. It is given to the launcher where that is our own, which shows the first failure once, else
    written to stderr.
    Under our own gang an interrupted run is a success: elastic must neither stop nor restart the
    ranks that are still closing their files. The launcher reads the status from `result.json`.

    SIGUSR2 writes the stacks of all threads to stderr and lets the work go on.
    """
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save; also inside C++ waits
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    ours = environ.GANG in os.environ
    try:
        status = work()
    except SapwoodError as error:
        status = REFUSED if isinstance(error, UserError) else FAILED
        if not isinstance(error, RefusedElsewhere):
            _tell(f"error: {error}", ours)
    except Exception as error:
        status = FAILED
        where = error.__traceback__ and error.__traceback__.tb_next  # without this frame
        _tell("".join(traceback.format_exception(error.with_traceback(where))).rstrip(), ours)
    if status == DONE or (ours and status == INTERRUPTED):
        status = DONE
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads that wait for a dead rank must not keep this one alive, and one of torch's that
    # asks for the interpreter while that shuts down is unwound through C++ that may not be, which aborts a
    # rank whose work was done.
    os._exit(status)


def _tell(text: str, ours: bool) -> None:
    if not ours:
        print(text, file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:  # the form that torch.distributed.elastic reads
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
