"""Ranks as shards of copies: who holds what, and which worlds come out even."""

import pytest
import torch

from framework.errors import ConfigError
from framework.strategy.mesh import Mesh, mesh_of, ranks_of_a_host
from framework.strategy.world import Group


class Told(Group):
    """A rank of a world whose local ranks are given."""

    def gather(self, value):
        return self.local_ranks


def told(local_ranks):
    world = Told(0, len(local_ranks), 0, torch.device("cpu"))
    world.local_ranks = local_ranks
    return world


@pytest.mark.parametrize(
    ("local_ranks", "size"), [([0, 1, 2, 3], 4), ([0, 1, 0, 1], 2), ([0, 0, 0], 1), ([0, 1, 2, 0, 1, 2], 3)]
)
def test_ranks_of_a_host_are_read_off_their_numbers(local_ranks, size):
    assert ranks_of_a_host(told(local_ranks)) == size


@pytest.mark.parametrize("local_ranks", [[0, 1, 2, 0], [0, 1, 0], [0, 0, 1, 1]])
def test_hosts_that_differ_are_refused(local_ranks):
    with pytest.raises(ConfigError, match="type strategy=fsdp"):
        ranks_of_a_host(told(local_ranks))


def test_a_world_that_does_not_divide_is_a_mistake():
    with pytest.raises(ValueError, match="4 ranks do not divide into groups of 3"):
        mesh_of(told([0, 1, 2, 3]), 3)


@pytest.mark.parametrize("length", [0, 1, 2, 5, 6])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_share_the_saving_of_a_shard(length, copies):
    """Every element of a shard is saved by one copy exactly, in order."""
    parts = [Mesh(0, 2, copy, copies, None, None).own(length) for copy in range(copies)]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(length))
