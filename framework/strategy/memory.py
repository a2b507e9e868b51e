"""Activation checkpointing: what a block's forward pass keeps for its backward pass.

It wraps the *forward* of blocks of `model.blocks()`, not the block: parameter names stay as they are,
and the hooks by which FSDP2 and ZeRO-3 gather weights run outside, once, and not again when the block
is computed a second time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from framework.strategy.base import Shardable
from framework.strategy.lean import make_lean

EVERY = {"full": 1, "selective": 2}
"""Of how many blocks one is checkpointed.

"selective" takes every other block: half the memory of activations for half the second forward
pass. Keeping the results of matrix products in every block instead (torch's operator-level
checkpointing) came to the same memory and 0 to 5 % more time on a CPU (8 blocks of a 135M Llama,
bf16, 256 to 2048 tokens), because it dispatches every operation through Python; and it asks each
attention kernel to be known by name. Blocks work with all of them. Not measured on a GPU.
"""


def checkpoint_blocks(model: nn.Module, kind: str) -> None:
    """Make blocks of `model` keep only their inputs and compute again in the backward pass.

    `kind` is "none", "selective" (every other block) or "full" (all). Blocks that keep their products
    drop at least what is cheap to compute again (`lean`). Gradients are the same to the
    bit, dropout included: the generators' states are put back for the second computation.
    """
    for number, block in enumerate(cast(Shardable, model).blocks()):
        if kind != "none" and number % EVERY[kind] == 0:
            block.forward = _checkpointed(block.forward)
        else:
            make_lean(block)  # what a checkpointed block drops as a whole needs no second saving


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            # the second computation would append to the cache again
            raise ValueError(
                "a checkpointed block got a key-value cache; call the model with use_cache=False"
            )
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    return checkpointed
