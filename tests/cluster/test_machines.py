"""Launchers of several machines agree, hear from one another and name who is missing. In threads: the store
and the signs of life are real, the machines need not be. Real commands: `test_launched_on_machines`.
"""

import socket
import threading
import time

import pytest

from framework.cluster import machines
from framework.cluster.machines import MachineLost, gathered
from framework.cluster.worker import RefusedElsewhere
from framework.errors import DataError, SapwoodError


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(machines, "BEAT_S", 0.2)
    monkeypatch.setattr(machines, "SILENT_S", 0.9)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def play(scene, count=3, timeout_s=60.0, present=None):
    """What `scene(machine)` returned or raised on each machine, by rank; None for one that is not present."""
    port = free_port()
    answers = {}

    def one(rank):
        try:
            with gathered(
                rank=rank, count=count, address="127.0.0.1", port=port, timeout_s=timeout_s
            ) as machine:
                answers[rank] = scene(machine)
        except SapwoodError as error:
            answers[rank] = error

    threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in present or range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return [answers.get(rank) for rank in range(count)]


def watch(machine, until_s=60.0):
    """As an agent does while its workers run."""
    end = time.monotonic() + until_s
    while time.monotonic() < end:
        machine.check()
        time.sleep(0.05)


def test_one_machine_needs_no_store():
    with gathered(rank=0, count=1, address=None, port=None, timeout_s=1) as alone:
        assert alone.first(lambda: 5) == 5
        alone.each(lambda: None)
        alone.check()
        assert alone.store is None


def test_machine_0_decides_and_all_hear():
    def scene(machine):
        decided = machine.first(lambda: {"by": machine.rank})
        machine.each(lambda: time.sleep(0.3 * machine.rank))
        return decided, machine.silent()

    assert play(scene) == [({"by": 0}, "")] * 3


def test_what_one_machine_refuses_is_refused_on_all():
    def scene(machine):
        def prepare():
            if machine.rank == 1:
                raise DataError("no assistant turn", path="mine.jsonl", line=17)

        machine.each(prepare)

    first, second, third = play(scene)
    assert isinstance(second, DataError)
    assert isinstance(first, RefusedElsewhere)
    assert str(first) == str(third) == "DataError: mine.jsonl:17: no assistant turn"


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_ends_the_others_at_once_with_its_words(failing):
    def scene(machine):
        machine.each(lambda: None)
        if machine.rank == failing:
            machine.fail("error: rank 5 (process 7) was ended by SIGKILL")
            raise SapwoodError("mine")
        watch(machine)

    began = time.monotonic()
    answers = play(scene)
    assert time.monotonic() - began < 20  # the other way is a minute
    assert str(answers.pop(failing)) == "mine"
    for answer in answers:
        assert isinstance(answer, MachineLost)
        assert str(answer).startswith(f"machine {failing} (")
        assert str(answer).endswith("failed: error: rank 5 (process 7) was ended by SIGKILL")


@pytest.mark.parametrize("waiting", ["workers", "agreement"])
def test_a_machine_that_falls_silent_is_named_by_all_in_time(waiting):
    """Machine 2 stops beating, as when its link is cut; the others name it, and it ends by itself."""

    def scene(machine):
        machine.each(lambda: None)
        if machine.rank == 2:
            heart = machine.check.__self__
            while 2 not in heart._names:  # until machine 0 has heard of it and said so
                time.sleep(0.05)
            heart._stopped.set()  # the thread that beats
            heart._thread.join()
        if waiting == "workers" or machine.rank == 2:
            watch(machine)
        machine.each(lambda: None)

    began = time.monotonic()
    answers = play(scene, timeout_s=3.0)
    assert 3 <= time.monotonic() - began < 20  # tests/multihost measures it; here other tests run beside
    for answer in answers[:2]:
        assert "of 3 machines, machine 2 (" in str(answer)
        assert "s, and launch.timeout_s=3 is over" in str(answer)
    assert "machine 0 (127.0.0.1:" in str(answers[2])


def test_machines_that_never_come_are_named():
    answers = play(lambda machine: machine.each(lambda: None), count=4, timeout_s=3.0, present=[0, 2])
    assert "machine 1 (never came), " in str(answers[0])
    assert "machine 3 (never came) have not been heard of for " in str(answers[0])
    alone = play(lambda machine: None, count=2, timeout_s=0.5, present=[1])
    assert "machine 0 (127.0.0.1:" in str(alone[1])
    assert "has not answered for 0.5 s" in str(alone[1])
    assert "launch.node_rank=0" in str(alone[1])


def test_a_name_that_leads_to_no_other_machine_is_refused(monkeypatch):
    """Debian gives a host's own name the address 127.0.1.1; a pod's own name is unknown for a while."""
    answers = [OSError, [(2, 1, 6, "", ("127.0.1.1", 0))]]

    def getaddrinfo(*_, **__):
        answer = answers.pop(0)
        if answer is OSError:
            raise socket.gaierror(-2, "Name or service not known")
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with (
        pytest.raises(MachineLost, match=r"launch.master_addr=gpu003 is 127.0.1.1 on machine 0"),
        gathered(rank=0, count=2, address="gpu003", port=1, timeout_s=20),
    ):
        pass
    answers += [OSError] * 9
    with (
        pytest.raises(MachineLost, match=r"launch.master_addr=gpu003: Name or service not known"),
        gathered(rank=0, count=2, address="gpu003", port=1, timeout_s=0.6),
    ):
        pass


def test_an_address_of_another_machine_is_refused():
    with (
        pytest.raises(
            MachineLost, match=r"198\.51\.100\.1:\d+: cannot listen there .*type launch.master_addr"
        ),
        gathered(rank=0, count=2, address="198.51.100.1", port=free_port(), timeout_s=1),
    ):
        pass
