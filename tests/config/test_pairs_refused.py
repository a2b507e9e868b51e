"""Ways of spreading a model that the rest of the tree rules out: what is said, and that it can be typed."""

import re
from types import SimpleNamespace

import pytest
import torch

from framework.config import pairs, work
from framework.config.compose import compose
from framework.config.spread import build_strategy
from framework.errors import ConfigError
from framework.strategy.world import connect

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
    (
        "launch.nproc=4 strategy=zeropp strategy.shard_size=3",
        "type strategy.shard_size=2 or strategy.shard_size=4",
    ),
    ("launch.nproc=4 strategy=zeropp strategy.shard_size=1", "to share a copy; type strategy=zero2"),
    (
        "strategy=zeropp launch.device=cpu",
        "DeepSpeed's kernels that quantise, which are for CUDA, on a CPU; expected a GPU, or nothing "
        "quantised; type strategy.quantized_weights=false strategy.quantized_gradients=false",
    ),
    (
        "strategy=zeropp precision=fp32 strategy.quantized_weights=false",
        "type precision=bf16 or strategy.quantized_weights=false strategy.quantized_gradients=false",
    ),
    (
        "strategy=zero3_offload strategy.optimizer=nvme",
        "type strategy.nvme_path=DIRECTORY, or strategy.optimizer=cpu",
    ),
    (
        "strategy=zero3_offload strategy.nvme_path=/fast",
        "type strategy.optimizer=nvme or strategy.nvme_path=null",
    ),
    ("strategy=zero3_offload model.compile=blocks", "type strategy=fsdp or model.compile=none"),
    ("strategy=zeropp model.compile=blocks", "type strategy=fsdp or model.compile=none"),
    ("model.fp8=tensorwise adapter=lora", "type adapter=full or model.fp8=null"),
    ("model.fp8=rowwise adapter=qlora", "type adapter=full or model.fp8=null"),
    ("model.fp8=tensorwise strategy=zero3", "type strategy=fsdp or model.fp8=null"),
    (
        "model.fp8=tensorwise precision=fp32",
        "8-bit floats, meant to save time, in a run of precision=fp32; expected bf16, or roundings that are "
        "emulated; type precision=bf16 or model.fp8_emulate=true",
    ),
    ("model.fp8=rowwise launch.device=cpu", "type model.fp8_emulate=true or model.fp8=null"),
    ("model.fp8_emulate=true", "type model.fp8=tensorwise or model.fp8_emulate=false"),
    ("adapter=dora stage=grpo reward=verifier strategy=zeropp", "type adapter=lora"),
]


@pytest.mark.parametrize(("line", "told"), REFUSED)
def test_what_cannot_work_is_refused_with_the_nearest_that_can(line, told):
    with pytest.raises(ConfigError) as refused:
        compose([*GIVEN, *line.split()])
    message = str(refused.value)
    assert told in message
    for alternative in re.split(r",? or ", message.rpartition("; type ")[2]):
        suggested = alternative.split()
        keys = tuple(f"{pair.partition('=')[0]}=" for pair in suggested)
        if any(key == "strategy=" for key in keys):  # another strategy has other keys
            keys = (*keys, "strategy")
        kept = [pair for pair in line.split() if not pair.startswith(keys)]
        compose([*GIVEN, *kept, *suggested])


def test_a_device_found_later_is_refused_in_the_same_words():
    """launch.device=auto: what there is is known to the ranks alone."""
    run = compose([*GIVEN, "strategy=zeropp"])
    pairs.check_device(run, "cuda")
    with pytest.raises(ConfigError, match="for CUDA, on a CPU"):
        build_strategy(run, connect("cpu", timeout_s=1, environment={}))


def test_a_device_found_later_is_refused_before_a_run_leaves_anything(monkeypatch):
    world = SimpleNamespace(rank=0, device=torch.device("cpu"))
    monkeypatch.setattr(work.build, "prepare", lambda run: SimpleNamespace(run=run))
    monkeypatch.setattr(work, "_join", lambda run, closing: world)
    monkeypatch.setattr(work, "agree", lambda *_: pytest.fail("went on"))
    with pytest.raises(ConfigError, match="products in 8-bit floats on a CPU"):
        work.work(compose([*GIVEN, "model.fp8=tensorwise"]))


@pytest.mark.parametrize("size", [2, 3, 4, 6, 12, "null"])
def test_groups_that_divide_the_ranks_are_accepted(size):
    world = ["launch.nproc=4", "launch.nnodes=3", "launch.master_addr=h", "launch.master_port=1"]
    run = compose([*GIVEN, *world, "strategy=hsdp", f"strategy.shard_size={size}"])
    assert run.strategy.shard_size == (None if size == "null" else size)
