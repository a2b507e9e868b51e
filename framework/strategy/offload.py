"""Saved activations in the CPU's memory: away when a block's forward pass keeps them, back for its backward.

Knows blocks and autograd's hooks, no checkpointing and no ranks. Copies run in the order of the device's own
stream, so memory is never used before it is filled and never given away before it is read; the device waits
for them. That is little where blocks are checkpointed and move their input alone, 2 d bytes a token, and much
where everything they keep is moved.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

LEAST_BYTES = 2**18  # below that a copy costs its launch and saves next to nothing


def offload_block(block: nn.Module) -> None:
    """Let what the forward pass of `block` keeps wait on the CPU. Gradients are the same to the bit.

    Weights stay, whose memory a strategy manages, and so does what is small or handed to all blocks
    alike by keyword (rotary tables, the plan of segments).
    """
    forward = block.forward

    @functools.wraps(forward)
    def offloading(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        shared = {_address(leaf) for leaf in tree_leaves(kwargs) if isinstance(leaf, Tensor)}
        moving = _Moving(block, shared)
        with torch.autograd.graph.saved_tensors_hooks(moving.pack, moving.unpack):
            return forward(*args, **kwargs)

    block.forward = offloading


@dataclass(frozen=True)
class _Moved:
    """A saved tensor that is away."""

    values: Tensor  # on the CPU
    device: torch.device


class _Moving:
    """What one forward pass of one block keeps."""

    def __init__(self, block: nn.Module, shared: set[int]) -> None:
        self._block = block
        self._shared = shared
        # by what a tensor is: several operations keep the same one, such as the input of three projections
        self._moved: dict[tuple[Any, ...], tuple[StorageWeakRef, _Moved]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Moved:
        if isinstance(tensor, nn.Parameter) or tensor.numel() * tensor.element_size() < LEAST_BYTES:
            return tensor
        address = _address(tensor)
        if address in self._shared or not tensor.is_floating_point() or _expanded(tensor):
            return tensor
        # looked up now: ZeRO-3 gathers a layer's weights after the block has begun
        for parameter in self._block.parameters():
            if _address(parameter) == address:
                # the parameter and no view of its memory, which ZeRO-3 gives back and gathers elsewhere
                whole = parameter.shape == tensor.shape and parameter.stride() == tensor.stride()
                return parameter if whole else tensor
        return self._away(tensor)

    def unpack(self, packed: Tensor | _Moved) -> Tensor:
        if isinstance(packed, _Moved):
            return packed.values.to(packed.device, non_blocking=True)
        return packed.detach()

    def _away(self, tensor: Tensor) -> _Moved:
        storage = tensor.untyped_storage()
        key = (
            storage._cdata,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor._version,
        )
        known = self._moved.get(key)
        if known is not None and not known[0].expired():  # else another tensor has taken its address
            return known[1]
        values = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        values.copy_(tensor, non_blocking=True)
        moved = _Moved(values, tensor.device)
        self._moved[key] = StorageWeakRef(storage), moved
        return moved


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _expanded(tensor: Tensor) -> bool:
    """Whether its copy would be larger than it is."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
