"""Children get each signal once and none outlives its parent: plain processes, no training."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from framework.cluster.child import Children

ROOT = Path(__file__).resolve().parents[2]
COUNTS = """
import signal, sys, time
seen = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: seen.append(number))
print("ready", flush=True)
deadline = time.monotonic() + 60
while not seen and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)  # a second one would come now
print(seen, flush=True)
sys.exit(3)
"""
PARENT = """
import sys
from framework.cluster.child import Children
with Children() as children:
    status = children.run([sys.executable, "-c", sys.argv[1]])
    again = children.run([sys.executable, "-c", "print('started all the same')"])
    print(status, again, children.stopped.name, flush=True)
"""


@pytest.fixture
def parent():
    """A process that waits for its child; both in a process group of their own, as on a terminal."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, COUNTS],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        process_group=0,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_terminals_group_reaches_the_child_once_and_starts_no_other(parent, number):
    os.killpg(parent.pid, number)
    out, _ = parent.communicate(timeout=30)
    assert out.splitlines() == [f"[{int(number)}]", f"3 {128 + number} {number.name}"]


def test_a_child_of_a_killed_parent_is_asked_to_leave(parent):
    parent.kill()
    assert select.select([parent.stdout], [], [], 30)[0], "the child lives on and says nothing"
    assert parent.stdout.readline() == f"[{int(signal.SIGTERM)}]\n"


def test_how_a_child_ended_is_its_status():
    with Children() as children:
        assert children.run([sys.executable, "-c", "raise SystemExit(2)"]) == 2
        killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        assert children.run([sys.executable, "-c", killed]) == 128 + signal.SIGKILL
        assert children.stopped is None


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Children():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
