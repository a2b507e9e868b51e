"""Ranks in two dimensions: shards of a model side by side, whole copies of it one below the other.

Ranks that share a copy follow one another, and launchers number the ranks of one host so: shards talk
over the links inside a host, copies over the network. One copy over all ranks is plain full sharding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from framework.errors import ConfigError
from framework.strategy.base import World
from framework.strategy.buckets import BUCKET_ELEMENTS


@dataclass(frozen=True)
class Mesh:
    """This rank holds shard `shard` of `shards` of copy `copy` of `copies`."""

    shard: int
    shards: int
    copy: int
    copies: int
    over_shards: Any  # torch's DeviceMesh, of one dimension
    over_copies: Any  # process group of the ranks that hold the same shard; None where they are one

    def piece_of(self, rank: int) -> int:
        """The shard that `rank` holds."""
        return rank % self.shards

    def own(self, length: int) -> tuple[int, int]:
        """(start, stop): of a shard of `length` elements what this copy saves, so that each is saved once."""
        size = -(-length // self.copies)
        return min(self.copy * size, length), min((self.copy + 1) * size, length)

    def add_over_copies(self, gradients: Sequence[Tensor], device: torch.device) -> None:
        """Sum the shards' fp32 `gradients` over copies, in place, bucket by bucket on `device`.

        The same bits on every rank that holds the same shard.
        """
        if self.over_copies is None:
            return
        bucket: list[Tensor] = []
        for index, gradient in enumerate(gradients):
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS or index == len(gradients) - 1:
                flat = torch.cat([g.reshape(-1) for g in bucket]).to(device)
                dist.all_reduce(flat, group=self.over_copies)
                for gradient_here, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient_here.copy_(total.view_as(gradient_here))
                bucket = []


def mesh_of(world: World, shards: int) -> Mesh:
    """`world` as copies of `shards` ranks each, a divisor of its size. Collective."""
    copies, rest = divmod(world.size, shards)
    if rest:
        raise ValueError(f"{world.size} ranks do not divide into groups of {shards}")
    place = world.rank % shards, shards, world.rank // shards, copies
    if copies == 1:
        return Mesh(*place, init_device_mesh(world.device.type, (shards,)), None)
    both = init_device_mesh(world.device.type, (copies, shards), mesh_dim_names=("copy", "shard"))
    return Mesh(*place, both["shard"], both.get_group("copy"))


def ranks_of_a_host(world: World) -> int:
    """How many ranks each host runs. Collective.

    Raises ConfigError where hosts run unlike numbers of ranks, or ranks are not numbered host by host.
    """
    local_ranks = world.gather(world.local_rank)
    size = max(local_ranks) + 1
    if world.size % size or local_ranks != [rank % size for rank in range(world.size)]:
        raise ConfigError(
            f"strategy: ranks 0 to {world.size - 1} are numbers {local_ranks} of their hosts; expected as "
            "many ranks on each host, numbered host by host; type strategy=fsdp"
        )
    return size
