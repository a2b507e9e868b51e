"""The process in which rewards run: reads calls from one socket, answers on it, knows nothing else.

Run as a file by `pool`, isolated and with the standard library alone; what it imports besides is the reward.
A line of JSON each way. Whatever the reward prints goes nowhere; what it forks answers to nobody.
"""

import contextlib
import ctypes
import functools
import importlib
import inspect
import json
import math
import numbers
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

KILLED_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h
LONGEST_REPORT = 4000  # characters of a traceback


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(KILLED_WITH_PARENT, signal.SIGKILL)
    lines = channel.makefile("r", encoding="utf-8")
    asked = json.loads(lines.readline())
    sys.path[:] = asked["path"]
    try:
        function = _find(asked["target"], asked["keywords"])
        signature = inspect.signature(function).parameters.values()
        parameters = [parameter.name for parameter in signature]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [p.name for p in signature if p.default is p.empty and p.kind not in variadic]
    except BaseException:
        _send(channel, {"problem": _report()})
        return
    # What the import took is the reward's own; what a call may add to it is bounded.
    with open("/proc/self/statm") as sizes:
        used = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + asked["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(channel, {"ready": parameters, "needed": needed})
    own = os.getpid()
    for line in lines:
        call = json.loads(line)
        # Should nobody be left to end this process, its processor time does.
        soft = int(time.process_time() + call["timeout_s"]) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        answer = _call(function, parameters, call["inputs"], call["count"])
        if os.getpid() != own:
            os._exit(0)
        _send(channel, {"id": call["id"], **answer})


def _find(target: str, keywords: dict) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if inspect.isclass(found):
        made: Any = found(**keywords)
        return made.score
    return functools.partial(found, **keywords)


def _call(function: Callable[..., Any], parameters: list, inputs: dict, count: int) -> dict:
    given = {name: value for name, value in inputs.items() if name in parameters}
    batched = "answers" in parameters
    try:
        answer = function(**given)
        values = list(answer) if batched else [answer]
        if len(values) != count:
            raise ValueError(f"{len(values)} values for {count} answers")
    except BaseException:  # a reward that calls sys.exit has failed like any other
        return {"problem": _report()}
    strange = [value for value in values if not _is_number(value)]
    report = f"returned {strange[0]!r:.200}; expected a finite number" if strange else None
    return {"values": [float(v) if _is_number(v) else None for v in values], "strange": report}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _report() -> str:
    return traceback.format_exc()[-LONGEST_REPORT:]


def _send(channel: socket.socket, answer: dict) -> None:
    channel.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
