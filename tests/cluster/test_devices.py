"""Devices of a host are lent to one job at a time, and free again however the job ends."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from framework.cluster.devices import leased, present
from framework.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from framework.cluster.devices import leased
with leased(["0", "1", "2"], 2, place=Path(sys.argv[1])) as lease:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=lease.locks)
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("visible", "pool"),
    [("0,1", ("0", "1")), ("GPU-ab, 3", ("GPU-ab", "3")), ("", ()), ("-1", ()), ("2,2", ("2",))],
)
def test_the_environment_names_the_pool(visible, pool):
    assert present({"CUDA_VISIBLE_DEVICES": visible}) == pool


def test_leases_do_not_overlap_and_wait_for_enough_at_once(tmp_path):
    pool = ["0", "1", "2"]
    seen, waited = [], threading.Event()

    def second():
        waited.set()
        with leased(pool, 2, place=tmp_path) as lease:
            seen.append(lease.devices)

    with leased(pool, 2, place=tmp_path) as first, leased(pool, 1, place=tmp_path) as other:
        assert first.variables == {"CUDA_VISIBLE_DEVICES": "0,1"}
        assert other.devices == ("2",)
        thread = threading.Thread(target=second)
        thread.start()
        waited.wait()
        time.sleep(0.4)
        assert seen == []
    thread.join(timeout=30)
    assert seen == [("0", "1")]


def test_a_job_of_a_killed_owner_keeps_its_devices(tmp_path):
    """The locks go with the last process that has them open, and with it at once."""
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    child = int(owner.stdout.readline())
    try:
        owner.kill()
        owner.wait()
        looks = iter([False, True])
        with leased(["0", "1", "2"], 2, stopped=lambda: next(looks), place=tmp_path) as lease:
            assert lease is None
    finally:
        subprocess.run(["kill", "-9", str(child)], check=True)
    with leased(["0", "1", "2"], 3, place=tmp_path) as lease:
        assert lease.devices == ("0", "1", "2")


def test_no_pool_nothing_to_divide_and_too_small_a_pool_is_refused(tmp_path):
    with leased((), 8, place=tmp_path) as lease:
        assert (lease.devices, lease.variables) == ((), {})
    with (
        pytest.raises(ConfigError, match=r"found 3 processes for the 2 devices .*launch\.nproc=2"),
        leased(["0", "1"], 3, place=tmp_path),
    ):
        pass
