"""Where ZeRO-3 keeps what it does not compute with, and what it sends: offloading and ZeRO++.

Knows the names of DeepSpeed's configuration, and no engine. What a machine must have for an option is asked
for here, before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from framework.errors import ConfigError
from framework.strategy.base import World
from framework.strategy.mesh import ranks_of_a_host

IN_MEMORY = 100_000_000
"""Parameters whose masters, moments and gradients are in memory at a time when they wait on disk: 1.6 GB."""


@dataclass(frozen=True)
class Offload:
    """ZeRO-Offload (Ren et al. 2021, arXiv 2101.06840), ZeRO-Infinity (Rajbhandari et al. 2021, 2104.07857).

    `optimizer` and `parameters` are "cpu" or "nvme", `parameters` also "none": on the device. Updates run on
    the CPU wherever masters and moments wait. `directory` is where files go, needed for "nvme" alone;
    `pinned` locks host memory, so that copies to a GPU are fast.
    """

    optimizer: str = "cpu"
    parameters: str = "none"
    directory: Path | None = None
    pinned: bool = True

    @property
    def on_disk(self) -> bool:
        """Whether anything waits in files."""
        return "nvme" in (self.optimizer, self.parameters)

    def sections(self, module: nn.Module, world: World, *, train: bool) -> dict[str, Any]:
        """Keys of `zero_optimization`. Raises ConfigError where this machine cannot do it."""
        pinned = self.pinned and world.device.type != "cpu"
        common: dict[str, Any] = {"pin_memory": pinned}
        if not train:  # frozen weights have no files: they are refilled in place
            return {} if self.parameters == "none" else {"offload_param": {"device": "cpu", **common}}
        if self.on_disk:
            common["nvme_path"] = str(self._usable())
        sections: dict[str, Any] = {"offload_optimizer": {"device": self.optimizer, **common}}
        if self.optimizer == "nvme":
            sections["sub_group_size"] = IN_MEMORY
        if self.parameters != "none":
            largest = max(parameter.numel() for parameter in module.parameters())
            # a buffer holds one rank's part of any parameter; its own default of 1e8 elements does not always
            size = {"buffer_size": math.ceil(largest / world.size)} if self.parameters == "nvme" else {}
            sections["offload_param"] = {"device": self.parameters, **common, **size}
        return sections

    def _usable(self) -> Path:
        """The directory, once it is known that files can be read and written as DeepSpeed does."""
        from deepspeed.ops.op_builder import AsyncIOBuilder

        assert self.directory is not None  # the schema
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"strategy.nvme_path={self.directory}: {error.strerror}; expected a directory on a local "
                "disk that every rank may write to; type strategy.nvme_path=DIRECTORY, or "
                "strategy.optimizer=cpu strategy.parameters=cpu"
            ) from error
        if not AsyncIOBuilder().is_compatible():
            raise ConfigError(
                "strategy.optimizer, strategy.parameters: nvme needs libaio and its headers, which are not "
                "found here; type `apt install libaio-dev` (or `dnf install libaio-devel`), or "
                "strategy.optimizer=cpu strategy.parameters=cpu"
            )
        return self.directory


@dataclass(frozen=True)
class PlusPlus:
    """ZeRO++ (Wang et al. 2023, arXiv 2306.10209).

    `shards` ranks keep a second copy of the weights among themselves for the backward pass (hpZ), "host" the
    ranks of one host, 1 none. `quantized_weights` gathers in 8 bits for the forward pass (qwZ),
    `quantized_gradients` reduces in 4 bits (qgZ): both lossy, by kernels for CUDA.
    """

    shards: int | str = "host"
    quantized_weights: bool = True
    quantized_gradients: bool = True

    def sections(self, module: nn.Module, world: World, *, train: bool) -> dict[str, Any]:
        """Keys of `zero_optimization`. Collective. Raises ConfigError where these ranks cannot do it."""
        shards = ranks_of_a_host(world) if self.shards == "host" else int(self.shards)
        if self.quantized_weights:
            _divides_into_eights(module, world)
        if self.quantized_gradients:
            _one_rank_a_device(world)
        return {
            # one copy over all ranks is the first copy again, and DeepSpeed would gather from it twice
            "zero_hpz_partition_size": 1 if shards == world.size else shards,
            "zero_quantized_weights": self.quantized_weights,
            "zero_quantized_gradients": self.quantized_gradients and train,
        }


def _divides_into_eights(module: nn.Module, world: World) -> None:
    """The kernel takes eight numbers at a time."""
    for name, parameter in module.named_parameters():
        if (part := math.ceil(parameter.numel() / world.size)) % 8:
            raise ConfigError(
                f"strategy.quantized_weights: {name} leaves {part} numbers on each of {world.size} ranks; "
                "expected a multiple of 8; type strategy.quantized_weights=false"
            )


def _one_rank_a_device(world: World, visible: Callable[[], int] = torch.cuda.device_count) -> None:
    """DeepSpeed takes the number of visible devices for the number of ranks of a host."""
    found = world.gather(visible())
    ranks = max(world.gather(world.local_rank)) + 1
    if world.size > ranks and set(found) != {ranks}:
        raise ConfigError(
            f"strategy.quantized_gradients: {ranks} ranks a host and {max(found)} visible devices; expected "
            f"one rank for each; type launch.nproc={max(found)}, or strategy.quantized_gradients=false"
        )
