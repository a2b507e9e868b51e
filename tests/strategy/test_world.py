"""Worlds: of one without a process group, of several with JSON and float64 exchanges."""

import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import workers

from framework.errors import ConfigError
from framework.strategy.world import connect, host_store

VALUE = {"text": "ünï", "list": [1, 2.5, None, True], "tenth": 0.1}


def exchanges(world):
    assert world.sum([2.0**53, 1.0 if world.rank == 0 else 0.0]) == [world.size * 2.0**53, 1.0]
    assert world.sum([0.1] * 3) == [sum([0.1] * world.size)] * 3
    assert world.max([-world.rank, world.rank]) == [0.0, world.size - 1]
    # texts of different lengths; rank 0's is the shortest
    assert world.gather({"from": "x" * 1000 * world.rank}) == [
        {"from": "x" * 1000 * rank} for rank in range(world.size)
    ]
    assert world.broadcast(VALUE if world.rank == 0 else "ignored") == VALUE
    world.barrier()
    return str(world.device)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_gets_the_same_answer(size):
    """0.1 + 0.1 + 0.1 in float64, and 2^53 + ... exact where float32 would lose the addend."""
    assert workers.run(size, exchanges) == ["cpu"] * size


def test_a_world_of_one_needs_no_process_group():
    world = connect("cpu", timeout_s=5, environment={})
    assert (world.rank, world.size, world.local_rank) == (0, 1, 0)
    assert not torch.distributed.is_initialized()
    assert exchanges(world) == "cpu"
    world.close()


def test_half_an_environment_is_refused():
    with pytest.raises(ConfigError, match=r"RANK, MASTER_ADDR is not.*torchrun"):
        connect("cpu", timeout_s=5, environment={"WORLD_SIZE": "2", "MASTER_PORT": "1"})


JOINS = """
from framework.strategy.world import connect
world = connect("cpu", timeout_s=10)
assert world.sum([world.rank + 1]) == [3.0]
world.barrier()
import os
port = int(os.environ["MASTER_PORT"])
rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
places = [row[1].split(":") for row in rows if row[3] == "0A"]
print(os.environ["GLOO_SOCKET_IFNAME"], *(address for address, p in places if int(p, 16) == port))
world.barrier()
world.close()
"""


def join(port, **environment):
    """Two processes join at `port`; what each printed, and how each ended."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": ":".join(sys.path), **environment}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", JOINS],
            env={"RANK": rank, "LOCAL_RANK": rank, **shared},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    return [(rank.communicate(timeout=60)[0].split(), rank.returncode) for rank in ranks]


def test_rank_zero_hosts_the_store_on_the_master_address_alone():
    """0100007F is 127.0.0.1: neither 0.0.0.0 nor ::, and gloo talks over the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert join(port) == [(["lo", "0100007F"], 0)] * 2


def test_a_second_attempt_does_not_see_the_keys_of_the_first():
    """The launcher's store outlives its workers: restarted ranks must not find dead ones' addresses."""
    store = host_store("127.0.0.1", 0, timeout=timedelta(seconds=10))
    for attempt in "01":
        ranks = join(store.port, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=attempt)
        assert ranks == [(["lo", "0100007F"], 0)] * 2
