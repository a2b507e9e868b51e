"""Activation checkpointing: what a block's forward pass keeps for its backward pass.

It wraps the *forward* of each block of `model.blocks()`, not the block: parameter names stay as they
are, and the hooks by which FSDP2 and ZeRO-3 gather weights run outside, once, and not again when the
block is recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from framework.strategy.base import Shardable

NONE, SELECTIVE, FULL = "none", "selective", "full"

KEPT = {"mm", "addmm", "_grouped_mm"}
"""Results of these aten operations are kept by `selective`, beside those of any attention kernel.

They are where a block spends its time; what is recomputed (norms, rotations, gates) is cheap. Not
`bmm`: in eager attention its result is the [T, T] matrix of scores.
"""


def checkpoint_blocks(model: nn.Module, kind: str) -> None:
    """Make the blocks of `model` keep less and compute again in the backward pass.

    `kind` "none" keeps everything, "selective" keeps what is costly to compute again, "full" keeps
    only a block's inputs. Gradients are the same to the bit, dropout included: the state of the
    generators is put back for the second computation.
    """
    if kind == NONE:
        return
    for block in cast(Shardable, model).blocks():
        block.forward = _checkpointed(block.forward, kind)


def _checkpointed(forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if kind == SELECTIVE:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    @functools.wraps(forward)
    def forward_again_in_backward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return forward_again_in_backward


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().partition("::")[2].partition(".")[0]
    if name in KEPT or "attention" in name or "attn" in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
