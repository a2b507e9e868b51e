"""Who am I? Answered from environment variables alone, by pure functions of a mapping.

Launchers speak in variables. Two questions are asked of them: is this process already one rank of a
world (`place`), and if not, is this machine one of several on which the same command was started
(`schedulers.node`)? Imports no torch, so that a refusal is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from framework.errors import ConfigError

WORKER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""All three set: a worker. The first two alone name a machine, as PyTorchJob does on its pods."""

GANG = "SAPWOOD_GANG"
"""Set in every worker of our own gang, to a word that no other gang has."""


@dataclass(frozen=True)
class Place:
    """One rank's place in a world that some launcher has made."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this machine
    local_size: int  # ranks on this machine; the whole world where the launcher does not say
    node_rank: int
    launcher: str  # gang (ours), torchrun, deepspeed or environment (set by hand)
    master_addr: str | None = None
    master_port: int | None = None

    def overrides(self) -> list[str]:
        """The world that was found, as settings for a command line."""
        nodes = -(-self.world_size // self.local_size)
        if nodes == 1:
            return [f"launch.nproc={self.local_size}"]
        assert self.master_addr is not None
        assert self.master_port is not None
        return [
            f"launch.nproc={self.local_size}",
            f"launch.nnodes={nodes}",
            f"launch.node_rank={self.node_rank}",
            f"launch.master_addr={self.master_addr}",
            f"launch.master_port={self.master_port}",
        ]


def place(environment: Mapping[str, str]) -> Place | None:
    """This process's place in its world, or None where nobody has started workers yet.

    Raises ConfigError, naming them, when some of the variables a worker needs are missing or wrong.
    """
    missing = [name for name in WORKER if name not in environment]
    if len(missing) == len(WORKER) or missing == ["LOCAL_RANK"]:
        return None
    if missing:
        found = ", ".join(f"{name}={environment[name]}" for name in WORKER if name in environment)
        raise ConfigError(
            f"the environment holds {found} but not {' and '.join(missing)}; a worker has all of "
            f"{', '.join(WORKER)}. Start with torchrun or deepspeed, or to start workers here type "
            f"`env {' '.join(f'-u {name}' for name in WORKER)} python launch/train.py ...`"
        )
    rank, world_size = number(environment, "RANK"), number(environment, "WORLD_SIZE", least=1)
    local_rank = number(environment, "LOCAL_RANK")
    local_size, node_rank = world_size, 0
    for size_name, node_name in (("LOCAL_WORLD_SIZE", "GROUP_RANK"), ("LOCAL_SIZE", "CROSS_RANK")):
        if size_name in environment:  # torchrun and our gang, or deepspeed
            local_size = number(environment, size_name, least=1)
            named = node_name in environment
            node_rank = number(environment, node_name) if named else rank // local_size
            break
    for name, value, below in (("RANK", rank, world_size), ("LOCAL_RANK", local_rank, local_size)):
        if value >= below:
            raise ConfigError(f"the environment holds {name}={value}; expected less than {below}")
    where = address(environment) if world_size > 1 else (None, None)
    return Place(rank, world_size, local_rank, local_size, node_rank, _launcher(environment), *where)


def strip_launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--local_rank=N`, which DeepSpeed puts first; the variables say it too."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if skip:
            skip = False
        elif name in ("--local_rank", "--local-rank"):
            skip = not value
        else:
            kept.append(argument)
    return kept


def _launcher(environment: Mapping[str, str]) -> str:
    if GANG in environment:
        return "gang"
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in environment else "environment"


def address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where the ranks meet: MASTER_ADDR and MASTER_PORT. Raises ConfigError where one is missing."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"the environment holds WORLD_SIZE={environment['WORLD_SIZE']} but not {' and '.join(missing)}, "
            "so the ranks cannot find each other; set MASTER_ADDR=HOST_OF_RANK_0 MASTER_PORT=29500"
        )
    return environment["MASTER_ADDR"], number(environment, "MASTER_PORT", least=1)


def number(environment: Mapping[str, str], name: str, *, least: int = 0) -> int:
    """A variable that holds a whole number of at least `least`. Raises ConfigError naming it."""
    text = environment[name]
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ConfigError(f"the environment holds {name}={text!r}; expected a whole number from {least} on")
    return int(text)
