"""Which machine is this: a table of what schedulers set, and what is refused by name."""

import pytest

from framework.cluster import schedulers
from framework.cluster.schedulers import Node, first_host
from framework.errors import ConfigError

HERE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
POD = {"RANK": "1", "WORLD_SIZE": "4", **HERE}
KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "8",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "mine-node-0-0.mine",
    "PET_MASTER_PORT": "29500",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "0",
    "SKYPILOT_NODE_IPS": "10.1.0.4\n10.1.0.5",
    "SKYPILOT_NUM_GPUS_PER_NODE": "4",
    "SKYPILOT_TASK_ID": "sky-2026-11-24-10-00-00-000000_mine_1",
}
SLURM_JOB = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
SLURM = SLURM_JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[003,017]",
    "SLURM_NODEID": "1",
    "SLURM_GPUS_ON_NODE": "8",
}
SLURM_PORT = 15000 + 123456 % 15000  # step 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"PATH": "/bin", **HERE}, None),
        (POD, Node(1, 4, "10.0.0.1", 29500)),
        (POD | {"LOCAL_RANK": "0"}, None),  # a worker
        ({"RANK": "0", "WORLD_SIZE": "1"}, Node(0, 1)),
        (KUBEFLOW, Node(1, 2, "mine-node-0-0.mine", 29500, 8)),
        (POD | KUBEFLOW, Node(1, 2, "mine-node-0-0.mine", 29500, 8)),
        ({"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "3"}, Node(0, 1, nproc=3)),
        ({"PET_NPROC_PER_NODE": "3"}, Node(0, 1, nproc=3)),
        (SKYPILOT, Node(0, 2, "10.1.0.4", schedulers.skypilot(SKYPILOT).master_port, 4)),
        (
            SKYPILOT | {"SKYPILOT_NUM_GPUS_PER_NODE": "0"} | KUBEFLOW,
            Node(1, 2, "mine-node-0-0.mine", 29500, 8),
        ),
        (SLURM_JOB, None),  # a batch script, or a shell in an allocation
        (SLURM, Node(1, 2, "gpu003", SLURM_PORT, 8)),
        (SLURM | {"SLURM_GPUS_ON_NODE": "0"}, Node(1, 2, "gpu003", SLURM_PORT)),
        (SLURM | {"SLURM_STEP_ID": "2"}, Node(1, 2, "gpu003", SLURM_PORT + 2018, 8)),
        (
            SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"},
            Node(0, 1, nproc=8),
        ),
    ],
)
def test_node(variables, expected):
    assert schedulers.node(variables) == expected


def test_a_node_as_settings():
    assert Node(1, 2, "gpu003", 15000, 8).overrides() == [
        "launch.nproc=8",
        "launch.nnodes=2",
        "launch.node_rank=1",
        "launch.master_addr=gpu003",
        "launch.master_port=15000",
    ]
    assert Node(0, 1, nproc=3).overrides() == ["launch.nproc=3"]
    assert Node(0, 1).overrides() == []


def without(variables, name):
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize("name", sorted({*SLURM} - {"SLURM_NNODES", "SLURM_PROCID", "SLURM_GPUS_ON_NODE"}))
def test_half_of_slurm_is_refused(name):
    if name == "SLURM_STEP_ID":  # without it nobody says that srun started us
        assert schedulers.node(without(SLURM, name)) is None
    else:
        with pytest.raises(ConfigError, match=f"but not {name};"):
            schedulers.node(without(SLURM, name))


@pytest.mark.parametrize("name", sorted({*KUBEFLOW} - {"PET_NPROC_PER_NODE"}))
def test_half_of_kubeflow_is_refused(name):
    with pytest.raises(ConfigError, match=f"but not {name};"):
        schedulers.node(without(KUBEFLOW, name))


@pytest.mark.parametrize("name", ["SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS"])
def test_half_of_skypilot_is_refused(name):
    with pytest.raises(ConfigError, match=f"but not {name};"):
        schedulers.node(without(SKYPILOT, name))


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (without(POD, "MASTER_PORT"), "not MASTER_PORT"),
        (POD | {"RANK": "4"}, "RANK=4; expected less than WORLD_SIZE=4"),
        (KUBEFLOW | {"PET_NNODES": "1:4"}, "PET_NNODES='1:4'"),
        (KUBEFLOW | {"PET_NODE_RANK": "2"}, "PET_NODE_RANK=2; expected less than PET_NNODES=2"),
        (KUBEFLOW | {"PET_NPROC_PER_NODE": "all"}, "PET_NPROC_PER_NODE='all'"),
        (SKYPILOT | {"SKYPILOT_NODE_IPS": "10.1.0.4"}, "1 addresses in SKYPILOT_NODE_IPS"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "16"}, "16 tasks on 2 nodes; expected one on each"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[003"}, "SLURM_STEP_NODELIST='gpu\\[003'"),
        (SLURM | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2; expected less than SLURM_STEP_NUM_NODES=2"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(variables, named):
    with pytest.raises(ConfigError, match=named):
        schedulers.node(variables)


@pytest.mark.parametrize(
    ("word", "gpus", "nproc"), [("auto", 4, 4), ("auto", 0, None), ("gpu", 4, 4), ("3", 4, 3)]
)
def test_torchruns_words_for_the_number_of_processes(word, gpus, nproc):
    one = {"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": word}
    assert schedulers.kubeflow(one, gpus=lambda: gpus).nproc == nproc
    with pytest.raises(ConfigError, match="shows no CUDA device"):
        schedulers.kubeflow(one | {"PET_NPROC_PER_NODE": "gpu"}, gpus=lambda: 0)
    assert schedulers.kubeflow(one | {"PET_NPROC_PER_NODE": "cpu"}).nproc >= 1


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("alone", "alone"),
        ("a,b,c", "a"),
        ("gpu[007-012,031],login", "gpu007"),
        ("gpu-a100[1]", "gpu-a1001"),
        ("rack[2-3]node[04-08],x", "rack2node04"),
        ("n[1-2].cluster.org,m", "n1.cluster.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, host):
    """As `scontrol show hostnames` would print first."""
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "[1-2", "a b", "gpu[x]", "$(reboot)"])
def test_what_is_no_node_list(nodelist):
    with pytest.raises(ConfigError, match="no list of host names"):
        first_host(nodelist)
