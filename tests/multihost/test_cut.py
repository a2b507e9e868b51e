"""The real command, the same on each of several hosts: the losses of one host, and a host that is cut off."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import Hosts

pytestmark = pytest.mark.multihost
TRAIN = str(Path(__file__).parents[2] / "launch" / "train.py")
TIMEOUT_S = 8  # launch.timeout_s: how long machines and ranks wait for one another


@pytest.fixture
def hosts():
    """hosts(count): deleted with all that runs on them, however the test ends."""
    made = []

    def get(count):
        made.append(Hosts(count))
        return made[-1]

    yield get
    for one in made:
        one.close()


def start(hosts, command, logs):
    """The command on every host; what each says goes to logs/host-N."""
    logs.mkdir(exist_ok=True)
    processes = []
    for host in range(len(hosts.names)):
        place = (
            []
            if len(hosts.names) == 1
            else [
                f"launch.nnodes={len(hosts.names)}",
                f"launch.node_rank={host}",
                f"launch.master_addr={hosts.address(0)}",
                "launch.master_port=29500",
            ]
        )
        with (logs / f"host-{host}").open("w") as file:
            told = [sys.executable, TRAIN, *command, *place]
            processes.append(hosts.start(host, told, stdout=file, stderr=subprocess.STDOUT))
    return processes


def losses(run_dir):
    """Loss by step; a step that stands twice is an error."""
    path, found = run_dir / "metrics.jsonl", {}
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        if line["kind"] == "train":
            assert line["step"] not in found, f"step {line['step']} stands twice"
            found[line["step"]] = line["loss"]
    return found


def finish(processes, logs, timeout_s=900):
    statuses = [process.wait(timeout_s) for process in processes]
    said = [(logs / f"host-{host}").read_text() for host in range(len(processes))]
    return statuses, said


def wait_for_step(run_dir, step, processes, timeout_s=900):
    deadline = time.monotonic() + timeout_s
    while max(losses(run_dir), default=0) < step:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.05)


@pytest.fixture
def command(settings, tmp_path):
    def get(name, **changes):
        common = {"tracker__report": "false", "checkpoint__export": "false", "launch__timeout_s": TIMEOUT_S}
        return tmp_path / name, settings(**{"run_dir": tmp_path / name, **common, **changes})

    return get


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_the_same_command_on_two_hosts_trains_as_on_one(strategy, hosts, command, tmp_path):
    two, told = command("two", strategy=strategy, steps=6, launch__timeout_s=120)
    statuses, said = finish(start(hosts(2), told, tmp_path / "logs"), tmp_path / "logs")
    assert statuses == [0, 0], said
    one, told = command("one", strategy="ddp", steps=6)
    statuses, said = finish(start(hosts(1), told, tmp_path / "logs"), tmp_path / "logs")
    assert statuses == [0], said
    assert list(losses(two)) == [1, 2, 3, 4, 5, 6]
    assert list(losses(two).values()) == pytest.approx(list(losses(one).values()), rel=1e-5)


def test_a_host_that_is_cut_off_ends_all_in_time_by_name_and_the_run_goes_on(hosts, command, tmp_path):
    """Host 2 of 4: the others name it, it names machine 0; put back, the same line goes on."""
    four, logs = hosts(4), tmp_path / "logs"
    run_dir, told = command("cut", strategy="fsdp", checkpoint__every=4, steps=40)
    processes = start(four, told, logs)
    wait_for_step(run_dir, 6, processes)
    four.cut(2)
    cut = time.monotonic()
    statuses, said = finish(processes, logs)
    took = time.monotonic() - cut
    assert took < TIMEOUT_S + 5, f"{took:.1f} s"
    assert statuses == [1] * 4, said
    for host in (0, 1, 3):
        assert re.search(r"machine 2 \(.*\) ha(s|ve) not been heard of", said[host]), said[host]
    assert f"machine 0 ({four.address(0)}:29500)" in said[2], said[2]
    reached = max(losses(run_dir))
    assert 6 <= reached < 40
    assert json.loads((run_dir / "result.json").read_text())["status"] == "failed"
    four.join(2)
    statuses, said = finish(start(four, told, logs), logs)
    assert statuses == [0] * 4, said
    assert list(losses(run_dir)) == list(range(1, 41))
    one, told = command("one", strategy="ddp", steps=40)
    statuses, said = finish(start(hosts(1), told, logs), logs)
    assert statuses == [0], said
    assert list(losses(run_dir).values()) == pytest.approx(list(losses(one).values()), rel=1e-5)


def test_a_flap_shorter_than_the_timeout_is_survived(hosts, command, tmp_path):
    two, logs = hosts(2), tmp_path / "logs"
    run_dir, told = command("flap", strategy="fsdp", steps=20, launch__timeout_s=60)
    processes = start(two, told, logs)
    wait_for_step(run_dir, 4, processes)
    two.cut(1)
    time.sleep(3)
    two.join(1)
    statuses, said = finish(processes, logs)
    assert statuses == [0, 0], said
    assert list(losses(run_dir)) == list(range(1, 21))
