"""Matrix products of blocks' linear layers in 8-bit floats, forward and backward, by torchao.

Both factors of a product are scaled so that their largest magnitude fits the format, rounded to 8 bits,
multiplied with sums in fp32, and scaled back. A layer keeps its parameters, under their names and in their
dtype, so masters, optimizer, checkpoints and files know nothing of it.

Weights are scaled whole: a layer computes inside the hooks that gather its block. Activations and their
gradients are scaled over the tokens of a micro-batch, so here, unlike elsewhere, how a step is cut moves
results within the rounding. With "rowwise_with_gw_hp" every token has a scale of its own, and it does not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from framework.errors import ConfigError

MULTIPLE = 16  # what the hardware wants both dimensions of a weight to be a multiple of
CAPABILITY = (8, 9)  # of the first CUDA devices with 8-bit floats: Ada and Hopper


@dataclass(frozen=True)
class Fp8:
    """How products are rounded.

    `recipe` is torchao's name: "tensorwise" (one scale a tensor; gradients in e5m2, the rest in e4m3),
    "rowwise" (one a row or column, all in e4m3) or "rowwise_with_gw_hp" (the same, but gradients of weights
    are not rounded). `emulate` computes the same roundings in fp32, on any device.
    """

    recipe: str
    emulate: bool = False


def check_package() -> None:
    """Raises ConfigError where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "model.fp8: found no package torchao, which multiplies in 8-bit floats; "
            "type pip install 'sapwood[fp8]', or model.fp8=null"
        )


def check_fp8(how: Fp8, device: torch.device) -> None:
    """Raises ConfigError where products cannot be computed on `device` as `how` says."""
    check_package()
    if how.emulate:
        return
    found = f"a device of type {device.type}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= CAPABILITY:
            return
        found = (
            f"{torch.cuda.get_device_name(device)}, of compute capability {'.'.join(map(str, capability))}"
        )
    raise ConfigError(
        f"model.fp8: found {found}; expected a CUDA device of compute capability 8.9 or more, which has "
        "8-bit floats; type model.fp8=null, or model.fp8_emulate=true for the same roundings, computed slowly"
    )


def linear_layers(block: nn.Module) -> Iterator[tuple[str, nn.Linear, bool]]:
    """(name in `block`, layer, whether it can be converted) of every linear layer, by its dimensions."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module, _fits(module)


def convert_block(block: nn.Module, how: Fp8) -> None:
    """Let the linear layers of `block` that can multiply as `how` says, in place.

    Their parameters are the same objects before and after. Weights must still be whole.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(how.recipe)
    # a weight's gradient sums over tokens, whose number is no multiple of 16: zeros are added to it
    config = replace(config, emulate=how.emulate, pad_inner_dim=True)
    convert_to_float8_training(block, module_filter_fn=lambda module, _: _fits(module), config=config)


def _fits(module: nn.Module) -> bool:
    return type(module) is nn.Linear and all(size % MULTIPLE == 0 for size in module.weight.shape)
