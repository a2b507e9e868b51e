"""Blocks compiled by torch: one graph for all blocks of a kind, whatever the number of tokens.

Attention stays as it is, a call between two compiled halves: how it cuts a row into segments changes with
every micro-batch, and its kernels are fused already.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from framework.errors import ConfigError


def compile_block(block: nn.Module) -> None:
    """Compile the forward pass of `block`, at its first call."""
    # without `dynamic` every new number of tokens would be compiled for itself
    block.forward = torch.compile(block.forward, dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch could not compile for `device`."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    lacks = None
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        lacks = "a C++ compiler, which is not found (g++, or the one that CXX names)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        lacks = "the package triton, which is not installed"
    if lacks:
        raise ConfigError(f"model.compile=blocks needs {lacks}; install it, or type model.compile=none")
