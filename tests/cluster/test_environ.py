"""Who am I: a table of what launchers set, what is refused, and arguments that are not ours."""

import os
import signal

import pytest

from framework.cluster import environ
from framework.cluster.environ import Place
from framework.cluster.signals import StopRequest
from framework.errors import ConfigError

HERE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
RANK_5 = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **HERE}
TORCHRUN = {"LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {"LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"MASTER_ADDR": "10.0.0.1", "PATH": "/bin"}, None),
        ({"RANK": "1", "WORLD_SIZE": "4", **HERE}, None),  # a pod, which starts its own workers
        (RANK_5 | TORCHRUN, Place(5, 8, 1, 4, 1, "torchrun", "10.0.0.1", 29500)),
        (RANK_5 | TORCHRUN | {environ.GANG: "w"}, Place(5, 8, 1, 4, 1, "gang", "10.0.0.1", 29500)),
        (RANK_5 | DEEPSPEED, Place(5, 8, 1, 4, 1, "deepspeed", "10.0.0.1", 29500)),
        (RANK_5, Place(5, 8, 1, 8, 0, "environment", "10.0.0.1", 29500)),
        (RANK_5 | {"LOCAL_WORLD_SIZE": "4"}, Place(5, 8, 1, 4, 1, "environment", "10.0.0.1", 29500)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Place(0, 1, 0, 1, 0, "environment")),
    ],
)
def test_place(variables, expected):
    assert environ.place(variables) == expected


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "0"}, "not WORLD_SIZE and LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "not RANK and LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "not RANK and WORLD_SIZE"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "not WORLD_SIZE;"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "not RANK;"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "not MASTER_ADDR and MASTER_PORT"),
        (RANK_5 | {"RANK": "five"}, "RANK='five'"),
        (RANK_5 | {"RANK": "8"}, "RANK=8; expected less than 8"),
        (RANK_5 | TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4; expected less than 4"),
        (RANK_5 | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_place_refuses_by_name(variables, named):
    with pytest.raises(ConfigError, match=named):
        environ.place(variables)


def test_a_place_tells_the_world_it_found():
    assert environ.place(RANK_5 | TORCHRUN).overrides()[:3] == [
        "launch.nproc=4",
        "launch.nnodes=2",
        "launch.node_rank=1",
    ]
    one = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **HERE}
    assert environ.place(one).overrides() == ["launch.nproc=2"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--local_rank=1", "seed=3"], ["seed=3"]),
        (["--local-rank=1", "seed=3"], ["seed=3"]),
        (["--local_rank", "1", "seed=3"], ["seed=3"]),
        (["seed=3", "--cfg", "job"], ["seed=3", "--cfg", "job"]),
        ([], []),
    ],
)
def test_launcher_arguments_are_dropped(given, kept):
    assert environ.strip_launcher_arguments(given) == kept


def test_a_stop_is_noted_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
