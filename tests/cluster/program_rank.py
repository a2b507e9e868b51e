"""One rank of a gang under test: `program_rank.py MODE`. Imports no torch, so that it starts at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from framework.cluster import worker
from framework.cluster.signals import StopRequest
from framework.errors import INTERRUPTED, CheckpointError, ConfigError

HELPER = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
RANK = int(os.environ["RANK"])


def helper(own_session: bool) -> int:
    """Process id of a helper, in this rank's session or, as services of libraries do, in its own."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", HELPER], stdout=subprocess.PIPE, start_new_session=own_session
    )
    return int(child.stdout.readline())


def other_is_ready() -> None:
    while "ready" not in Path(os.environ["LOGS"], "rank-0.log").read_text():
        time.sleep(0.02)


def settings() -> int:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    print(" ".join(f"{name}={os.environ[name]}" for name in names), os.environ.get("WORD"))
    print(f"\rhalf\r\x1b[32mwhole\x1b[0m {sys.stdout.isatty()}", file=sys.stderr)
    return 0


def raises() -> int:
    if RANK == 1:
        other_is_ready()
        raise RuntimeError("wrong on one")
    return wait()


def raises_beside_deaf() -> int:
    return raises() if RANK == 1 else deaf()


def killed() -> int:
    if RANK == 1:
        other_is_ready()
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return wait()


def second_time() -> int:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise RuntimeError("wrong the first time")
    return 0


def damaged() -> int:
    raise CheckpointError("a shard is missing")


def refuses() -> int:
    raise ConfigError("found this; expected that")


def wait() -> int:
    """Until a stop is asked for; then save, for half a second, with the helpers still there."""
    with StopRequest() as stop:
        helpers = [helper(False), helper(True)]
        print("ready", os.getpid(), *helpers, flush=True)
        while not stop.requested:
            time.sleep(0.01)
        time.sleep(0.5)
        assert all("sleep" in Path(f"/proc/{child}/cmdline").read_text() for child in helpers)
        print("saved after", signal.Signals(stop.signal).name, flush=True)
    return INTERRUPTED


def deaf() -> int:
    with StopRequest():
        print("ready", os.getpid(), flush=True)
        time.sleep(100)
    return 0


if __name__ == "__main__":
    worker.run(globals()[sys.argv[1]])
