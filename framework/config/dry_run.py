"""One micro-batch, forward and backward, on tensors without memory: how much a device would have to hold.

The real model runs through the real blocks, losses' head and autograd on torch's meta device, and every
storage is counted from its birth to its death. So what is measured is the code that trains, checkpointed
blocks and lean norms included, and no formula has to follow it. Kernels' own scratch memory is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framework.batch import Batch
from framework.strategy.base import Build
from framework.strategy.memory import Blocks, prepare_blocks
from framework.strategy.offload import LEAST_BYTES

META = torch.device("meta")


@dataclass(frozen=True)
class Working:
    """Bytes beside parameters and summed gradients."""

    kept: int  # by the forward pass for the backward pass
    peak: int  # at any moment of the two
    host: int = 0  # moved to the host's memory in between


def structure(build: Build, dtype: torch.dtype) -> nn.Module:
    """The model with parameters of `dtype` and no memory."""
    with META:
        module = build()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(META, dtype)
    return module.to(META).train()


def rehearse(
    module: nn.Module, how: Blocks, batch: Batch, *, given: Iterable[Tensor] = (), **options: Any
) -> Working:
    """A forward pass of `batch` with `options` and a backward pass; `module` is changed and used up.

    Tensors in `options` that are held anyway are `given`, too, and not counted.
    Gradients of parameters are gone as soon as they have arrived, as if they were summed elsewhere.
    Compiled blocks count as lean ones: compilers drop the same. Raises what torch raises where an operation's
    result depends on values.
    """
    away = _Away(module)
    prepare_blocks(module, replace(how, compiled=False), offload=away.wrap)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_dropped)
    with _Storages([*module.parameters(), *given]) as storages:
        answers = module(batch, **options)
        kept = storages.live
        total = sum(a.sum() for a in tree_leaves(tuple(answers)) if isinstance(a, Tensor) and a.requires_grad)
        cast(Tensor, total).backward()
    return Working(kept, storages.peak, away.bytes)


def rows(tokens: int, length: int, *, wrap: type[Batch] = Batch, **extra: Any) -> Batch:
    """`tokens` in rows of `length`, every next token trained, on the meta device."""
    count = max(1, tokens // length)
    length = min(length, tokens)
    whole = torch.zeros(count, length, dtype=torch.int64, device=META)
    flat = torch.zeros(count * length, dtype=torch.int64, device=META)
    return wrap(
        input_ids=whole,
        position_ids=whole,
        boundaries=torch.zeros(count + 1, dtype=torch.int32, device=META),
        trained=flat,
        targets=flat,
        weights=flat.float(),
        segments=flat,
        sources=torch.zeros(count, dtype=torch.int64, device=META),
        packed=False,
        max_length=length,
        units=1.0,
        **extra,
    )


def _dropped(parameter: Tensor) -> None:
    parameter.grad = None


class _Storages(TorchDispatchMode):
    """Counts the bytes of storages that are alive, those of `held` left out."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held = [tensor.untyped_storage() for tensor in held]
        self._seen = {storage._cdata for storage in self._held}

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        answer = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(answer):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return answer

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes()).atexit = False

    def _gone(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


class _Away:
    """In place of `strategy.offload`, which would copy: what is moved leaves its shape behind."""

    def __init__(self, module: nn.Module) -> None:
        self._weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self.bytes = 0

    def wrap(self, block: nn.Module) -> None:
        forward = block.forward

        def offloading(*args: Any, **kwargs: Any) -> Any:
            shared = {x.untyped_storage()._cdata for x in tree_leaves(kwargs) if isinstance(x, Tensor)}
            with self._moving(shared | self._weights):
                return forward(*args, **kwargs)

        block.forward = offloading

    @contextmanager
    def _moving(self, staying: Collection[int]) -> Iterator[None]:
        moved: set[int] = set()

        def pack(tensor: Tensor) -> Any:
            storage, size = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
            if storage._cdata in staying or size < LEAST_BYTES or not tensor.is_floating_point():
                return tensor
            if storage._cdata not in moved:
                moved.add(storage._cdata)
                self.bytes += size
            return tensor.shape, tensor.dtype

        def unpack(packed: Any) -> Tensor:
            return (
                packed
                if isinstance(packed, Tensor)
                else torch.empty(*packed[:1], dtype=packed[1], device=META)
            )

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
