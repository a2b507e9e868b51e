"""Ways of spreading a model that the rest of the tree rules out: what is said, and that it can be typed."""

import re

import pytest

from framework.config.compose import compose
from framework.errors import ConfigError

GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]"]
REFUSED = [
    (
        "launch.nproc=8 strategy=hsdp strategy.shard_size=3",
        "strategy.shard_size, launch.nproc: 8 ranks in groups of 3; expected a size that divides 8; "
        "type strategy.shard_size=2 or strategy.shard_size=4",
    ),
    (
        "launch.nproc=4 launch.nnodes=3 launch.master_addr=h launch.master_port=1 strategy=hsdp "
        "strategy.shard_size=8",
        "12 ranks in groups of 8; expected a size that divides 12; type strategy.shard_size=6 or "
        "strategy.shard_size=12",
    ),
    ("launch.nproc=7 strategy=hsdp strategy.shard_size=3", "type strategy.shard_size=7"),
    ("launch.nproc=4 strategy=hsdp strategy.shard_size=16", "type strategy.shard_size=4"),
    (
        "strategy=hsdp strategy.shard_size=2",
        "1 rank in groups of 2; expected two or more ranks; type strategy=fsdp",
    ),
    (
        "launch.nproc=4 strategy=hsdp strategy.shard_size=1",
        "expected two or more ranks to share a copy; type strategy=ddp",
    ),
]


@pytest.mark.parametrize(("line", "told"), REFUSED)
def test_what_cannot_work_is_refused_with_the_nearest_that_can(line, told):
    with pytest.raises(ConfigError) as refused:
        compose([*GIVEN, *line.split()])
    message = str(refused.value)
    assert told in message
    for suggested in re.findall(r"[\w.]+=\w+", message.rpartition("; type ")[2]):
        kept = [pair for pair in line.split() if not pair.startswith(suggested.partition("=")[0])]
        chosen = "strategy=" in suggested  # another strategy has other keys
        compose([*GIVEN, *[k for k in kept if not (chosen and k.startswith("strategy"))], suggested])


@pytest.mark.parametrize("size", [2, 3, 4, 6, 12, "null"])
def test_groups_that_divide_the_ranks_are_accepted(size):
    world = ["launch.nproc=4", "launch.nnodes=3", "launch.master_addr=h", "launch.master_port=1"]
    run = compose([*GIVEN, *world, "strategy=hsdp", f"strategy.shard_size={size}"])
    assert run.strategy.shard_size == (None if size == "null" else size)
