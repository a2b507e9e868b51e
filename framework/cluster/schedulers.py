"""Which of several machines is this? Asked where a scheduler starts the same command once on each.

Every scheduler has its dialect of variables, and its function here: (environment) -> Node, or None where it
did not start us. What is said by halves is refused by name: a guess would train the wrong world, or wait
for machines that never come. Imports no torch, but for the one word that asks to count devices.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from framework.cluster.environ import address, number
from framework.errors import ConfigError

PORTS = (15000, 15000)  # first and how many: above well-known ports, below those given to outgoing calls

SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NODEID",
    "SLURM_STEP_NODELIST",
)
"""What srun sets for each task. A batch script and a login shell lack those of a step."""

KUBEFLOW = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
"""What Kubeflow's trainer sets on the pods of a TrainJob: torchrun's options as it reads them itself."""

SKYPILOT = ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS")
"""What SkyPilot sets for a task's `run`."""


@dataclass(frozen=True)
class Node:
    """This machine among those on which the same command was started."""

    rank: int
    count: int
    master_addr: str | None = None  # of machine 0; with several machines only
    master_port: int | None = None
    nproc: int | None = None  # workers on this machine; None where the scheduler does not say

    def overrides(self) -> list[str]:
        """The same, as settings for a command line."""
        settings = [] if self.nproc is None else [f"launch.nproc={self.nproc}"]
        if self.count > 1:
            settings += [
                f"launch.nnodes={self.count}",
                f"launch.node_rank={self.rank}",
                f"launch.master_addr={self.master_addr}",
                f"launch.master_port={self.master_port}",
            ]
        return settings


def node(environment: Mapping[str, str]) -> Node | None:
    """This machine's place among machines, or None where no scheduler has started us.

    Raises ConfigError when a variable is missing or wrong.
    """
    for dialect in (kubeflow, pod, skypilot, slurm):  # from the innermost, where one runs on top of another
        found = dialect(environment)
        if found is not None:
            return found
    return None


def kubeflow(environment: Mapping[str, str], *, gpus: Callable[[], int] | None = None) -> Node | None:
    """A pod of a TrainJob (Kubeflow trainer, v2): PET_NNODES and the rest.

    PET_NPROC_PER_NODE may be a number or one of torchrun's words: gpu (`gpus` counts them), cpu (one for each
    core), auto (the first where there is one, else what the configuration says).
    """
    if not any(name in environment for name in (*KUBEFLOW[:2], "PET_NPROC_PER_NODE")):
        return None
    nproc = _processes(environment, gpus or _gpus)
    if nproc is not None and not any(name in environment for name in KUBEFLOW[:2]):
        return Node(0, 1, nproc=nproc)
    _all(environment, KUBEFLOW[:2], "a pod of a TrainJob")
    count, rank = (
        number(environment, "PET_NNODES", least=1),
        _rank(environment, "PET_NODE_RANK", "PET_NNODES"),
    )
    if count == 1:
        return Node(0, 1, nproc=nproc)
    _all(environment, KUBEFLOW, f"a pod of {count}")
    port = number(environment, "PET_MASTER_PORT", least=1)
    return Node(rank, count, environment["PET_MASTER_ADDR"], port, nproc)


def pod(environment: Mapping[str, str]) -> Node | None:
    """RANK and WORLD_SIZE that count machines, as on the pods of a PyTorchJob (Kubeflow, v1)."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment or "LOCAL_RANK" in environment:
        return None
    rank, count = _rank(environment, "RANK", "WORLD_SIZE"), number(environment, "WORLD_SIZE", least=1)
    return Node(rank, count, *address(environment)) if count > 1 else Node(0, 1)


def skypilot(environment: Mapping[str, str]) -> Node | None:
    """A node of a SkyPilot task. The port follows from the task's id, which all nodes share."""
    if not any(name in environment for name in SKYPILOT):
        return None
    _all(environment, SKYPILOT, "a node of a SkyPilot task")
    count = number(environment, "SKYPILOT_NUM_NODES", least=1)
    rank = _rank(environment, "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES")
    addresses = environment["SKYPILOT_NODE_IPS"].split()
    if len(addresses) != count:
        raise ConfigError(
            f"the environment holds SKYPILOT_NUM_NODES={count} and {len(addresses)} addresses in "
            "SKYPILOT_NODE_IPS; expected one for each node"
        )
    nproc = None
    if "SKYPILOT_NUM_GPUS_PER_NODE" in environment:
        nproc = number(environment, "SKYPILOT_NUM_GPUS_PER_NODE") or None
    port = _port(zlib.crc32(environment.get("SKYPILOT_TASK_ID", "").encode()))
    return Node(rank, count, addresses[0], port, nproc)


def slurm(environment: Mapping[str, str]) -> Node | None:
    """A task of an srun with one task a node. The port follows from job and step, which all tasks share.

    Machine 0 is the first of the step's node list, which is read here: `scontrol` is not in every container.
    """
    if "SLURM_STEP_ID" not in environment:
        return None
    _all(environment, SLURM, "a task that srun started")
    count, tasks = (number(environment, f"SLURM_STEP_NUM_{what}", least=1) for what in ("NODES", "TASKS"))
    if tasks != count:
        raise ConfigError(
            f"srun started {tasks} tasks on {count} node{'s' * (count > 1)}; expected one on each, which "
            "starts the workers of its node; type `srun --ntasks-per-node=1 ... launch.nproc=GPUS_OF_A_NODE`"
        )
    rank = _rank(environment, "SLURM_NODEID", "SLURM_STEP_NUM_NODES")
    nproc = None
    if "SLURM_GPUS_ON_NODE" in environment:
        nproc = number(environment, "SLURM_GPUS_ON_NODE") or None
    if count == 1:
        return Node(0, 1, nproc=nproc)
    job, step = number(environment, "SLURM_JOB_ID"), number(environment, "SLURM_STEP_ID")
    return Node(rank, count, first_host(environment["SLURM_STEP_NODELIST"]), _port(job + 1009 * step), nproc)


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list: `gpu[007-012,031],login` begins with gpu007.

    Raises ConfigError for a list that cannot be read.
    """
    first = re.match(r"(?:[^,\[\]\s]|\[[^\[\]]*\])+(?=,|$)", nodelist)
    if first is not None:
        host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
        if re.fullmatch(r"[A-Za-z0-9._-]+", host):
            return host
    raise ConfigError(
        f"the environment holds SLURM_STEP_NODELIST={nodelist!r}, which is no list of host names; "
        "type launch.master_addr=HOST of the first node"
    )


def _processes(environment: Mapping[str, str], gpus: Callable[[], int]) -> int | None:
    word = environment.get("PET_NPROC_PER_NODE")
    if word == "cpu":
        return len(os.sched_getaffinity(0))
    if word in ("auto", "gpu"):
        count = gpus()
        if word == "gpu" and count == 0:
            raise ConfigError(
                "the environment holds PET_NPROC_PER_NODE='gpu', and this machine shows no CUDA device; "
                "set numProcPerNode to a number"
            )
        return count or None
    return None if word is None else number(environment, "PET_NPROC_PER_NODE", least=1)


def _gpus() -> int:
    from torch import cuda  # takes seconds, and nothing else needs it here

    return cuda.device_count()


def _all(environment: Mapping[str, str], names: tuple[str, ...], who: str) -> None:
    """Refuse an environment that holds some of `names` only."""
    missing = [name for name in names if name not in environment]
    if missing:
        found = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
        raise ConfigError(
            f"the environment holds {found or 'a part of what names this machine'} but not "
            f"{' and '.join(missing)}; {who} has all of {', '.join(names)}. Set what is missing, or start "
            "outside of the scheduler with launch.nnodes, launch.node_rank, launch.master_addr, "
            "launch.master_port"
        )


def _rank(environment: Mapping[str, str], name: str, count_name: str) -> int:
    rank, count = number(environment, name), number(environment, count_name, least=1)
    if rank >= count:
        raise ConfigError(f"the environment holds {name}={rank}; expected less than {count_name}={count}")
    return rank


def _port(word: int) -> int:
    first, many = PORTS
    return first + word % many
