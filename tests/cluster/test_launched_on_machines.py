"""The command started on two "machines" of this host, as schedulers start it: variables set by hand.

What a run is inside is replaced (`program_train.py`); launchers, their agreement and the gangs are real.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("program_train.py")
SETTINGS = ["model.path=somewhere", "data.train=[{path: mine.jsonl}]", "launch.nproc=1"]
PATIENCE_S = 120


@pytest.fixture
def machines(tmp_path):
    """start(rank, *arguments, **variables): the command in a directory of that machine's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []

    def start(rank, *arguments, **variables):
        place = tmp_path / f"machine-{rank}"
        place.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *SETTINGS, *arguments],
            cwd=place,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    def slurm(rank, *arguments):
        names = {"JOB_ID": "7", "STEP_ID": "0", "STEP_NUM_NODES": "2", "STEP_NUM_TASKS": "2"}
        names |= {"NODEID": str(rank), "STEP_NODELIST": "localhost"}
        variables = {f"SLURM_{name}": value for name, value in names.items()}
        return start(rank, f"launch.master_port={port}", *arguments, **variables)

    yield slurm
    for process in started:
        process.kill()
        process.wait()


def finish(process):
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out + err


def facts(tmp_path, rank):
    return json.loads((tmp_path / f"machine-{rank}" / f"rank-{rank}.json").read_text())


def wait_until_waiting(tmp_path, count=2):
    deadline = time.monotonic() + PATIENCE_S
    while sum("waiting" in log.read_text() for log in tmp_path.rglob("rank-*.log")) < count:
        assert time.monotonic() < deadline, "no run has started to wait"
        time.sleep(0.05)


def test_a_run_on_two_machines_ends_alike_on_both(machines, tmp_path):
    """They share no directory, and the second knows from the first that the run is stopped, then done."""
    both = [machines(rank, "seed=20") for rank in (0, 1)]
    wait_until_waiting(tmp_path)
    for process in both:
        process.send_signal(signal.SIGUSR1)  # as SLURM, ahead of the time limit
    assert [finish(process)[0] for process in both] == [3, 3]
    assert [facts(tmp_path, rank)["world_size"] for rank in (0, 1)] == [2, 2]
    (result,) = tmp_path.rglob("result.json")
    assert result.is_relative_to(tmp_path / "machine-0")
    result.write_text(json.dumps({"status": "done", "objective": 1.0}))
    for status, said in map(finish, [machines(rank, "seed=20") for rank in (0, 1)]):
        assert status == 0
        assert "already done" in said


def test_a_rank_that_fails_is_named_on_both_machines(machines, tmp_path):
    first, second = (machines(rank, "seed=13") for rank in (0, 1))
    status, said = finish(second)
    assert status == 1
    assert "RuntimeError: the thirteenth" in said
    status, said = finish(first)
    assert status == 1
    assert "error: machine 1 (" in said
    assert "RuntimeError: the thirteenth" in said
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["status"] == "failed"


def test_other_settings_on_a_machine_and_refused_data_end_both_with_status_2(machines, tmp_path):
    different = [machines(rank, f"seed={rank}") for rank in (0, 1)]
    for status, said in map(finish, different):
        assert status == 2
        assert "machine 1 was started with other settings than machine 0:\n  seed: 0 -> 1" in said
    for status, said in map(finish, [machines(rank, "seed=21") for rank in (0, 1)]):
        assert status == 2
        assert "mine.jsonl:17: no assistant turn" in said
    assert not list(tmp_path.rglob("result.json"))
