"""What a block's forward pass keeps for its backward pass and where, in what it multiplies, what is compiled.

Everything here changes the *forward* of blocks of `model.blocks()` or of their layers, and no parameter:
names stay as they are, and the hooks by which FSDP2 and ZeRO-3 gather weights run outside, once, and not
again when the block is computed a second time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from framework.strategy.base import Shardable
from framework.strategy.compiled import compile_block
from framework.strategy.fp8 import Fp8, convert_block
from framework.strategy.lean import make_lean
from framework.strategy.offload import offload_block

EVERY = {"full": 1, "selective": 2}
"""Of how many blocks one is checkpointed.

"selective" takes every other block: half the memory of activations for half the second forward
pass. Keeping the results of matrix products in every block instead (torch's operator-level
checkpointing) came to the same memory and 0 to 5 % more time on a CPU (8 blocks of a 135M Llama,
bf16, 256 to 2048 tokens), because it dispatches every operation through Python; and it asks each
attention kernel to be known by name. Blocks work with all of them. Not measured on a GPU.
"""


@dataclass(frozen=True)
class Blocks:
    """How blocks are computed.

    `checkpointing` is "none", "selective" (every other block keeps only its inputs and is computed again
    in the backward pass) or "full" (all do). `offload` moves what blocks keep to the CPU's memory until the
    backward pass asks for it. `compiled` lets torch compile each block. `fp8` lets their linear layers
    multiply in 8-bit floats.
    """

    checkpointing: str = "none"
    offload: bool = False
    compiled: bool = False
    fp8: Fp8 | None = None

    def checkpoints(self, number: int) -> bool:
        """Whether block `number` is computed again."""
        return self.checkpointing != "none" and number % EVERY[self.checkpointing] == 0


PLAIN = Blocks()


def prepare_blocks(
    model: nn.Module, how: Blocks, *, offload: Callable[[nn.Module], None] = offload_block
) -> None:
    """Make the blocks of `model` compute as `how` says; `offload` moves what a block keeps.

    Checkpointing and offloading change no bit of a gradient, dropout included: the generators' states are
    put back for the second computation. Compiled blocks round in another order, and draw other dropout.
    Blocks that keep their products here, uncompiled, drop at least what is cheap to compute again (`lean`):
    a compiler does so by itself, and what is moved away needs no second saving.
    """
    for number, block in enumerate(cast(Shardable, model).blocks()):
        if how.fp8:
            convert_block(block, how.fp8)  # innermost: the others wrap what it computes
        again = how.checkpoints(number)
        if not (again or how.compiled or how.offload):
            make_lean(block)
        if how.compiled:
            compile_block(block)
        if again:
            block.forward = _checkpointed(block.forward)
        if how.offload:
            offload(block)  # outermost: it moves what a checkpointed block keeps, its input


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
