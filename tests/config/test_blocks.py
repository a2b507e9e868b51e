"""What is done to blocks, from a composed run, on a device."""

import importlib.util

import pytest
import torch

from framework.config.blocks import blocks_of
from framework.config.compose import compose
from framework.errors import ConfigError
from framework.strategy.fp8 import Fp8
from framework.strategy.memory import Blocks

GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Blocks()),
        (["model.activation_checkpointing=selective"], Blocks("selective")),
        (["model.activation_offload=true"], Blocks(offload=True)),
        (
            ["model.activation_checkpointing=full", "model.activation_offload=true"],
            Blocks("full", offload=True),
        ),
    ],
)
def test_every_key_reaches_the_blocks(overrides, expected):
    assert blocks_of(compose([*GIVEN, *overrides]), CUDA) == expected


def test_compile_is_asked_for():
    assert blocks_of(compose([*GIVEN, "model.compile=blocks"]), CPU) == Blocks(compiled=True)


def test_8_bit_floats_are_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    run = compose([*GIVEN, "model.fp8=rowwise", "model.fp8_emulate=true"])
    assert blocks_of(run, CPU) == Blocks(fp8=Fp8("rowwise", emulate=True))


def test_offloading_from_a_cpu_is_refused():
    with pytest.raises(ConfigError, match=r"type model\.activation_offload=false, or .*checkpointing=full"):
        blocks_of(compose([*GIVEN, "model.activation_offload=true"]), CPU)
