"""What engines share: building without memory, filling by name, updating masters, state by name.

An engine describes what it trains as `Part`s: plain fp32 tensors with their place in the whole
parameter. Whether a part is all of a parameter or a few rows of it is the only thing that differs
between the strategies here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framework.strategy.base import (
    FIRST,
    MASTER,
    SECOND,
    Build,
    EngineState,
    OptimizerFactory,
    Read,
    Shard,
    Slice,
    Weights,
    World,
)

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""precision -> dtype of weights and activations in forward and backward passes."""

ROW = 2**10
"""Elements whose squares are added in fp32 before float64 takes over, in `sum_of_squares`."""

Places = dict[nn.Parameter, list[tuple[nn.Module, str]]]
"""Where each parameter hangs: several (module, attribute) pairs when it is tied."""


@dataclass(frozen=True)
class Part:
    """A trained parameter on this rank: `master` holds its flattened elements from `first` on.

    Of these, `start` to `stop` (counted in the whole parameter) are this rank's to save.
    """

    shape: tuple[int, ...]  # of the whole parameter
    first: int
    master: nn.Parameter  # fp32, contiguous; what the optimizer updates
    start: int
    stop: int


def named(
    parameters: Iterable[tuple[str, nn.Parameter]], without: str | None
) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter), but for names that begin with `without`."""
    return ((name, p) for name, p in parameters if without is None or not name.startswith(without))


def build_on_meta(build: Build, device: torch.device) -> nn.Module:
    """The model with parameters that take no memory and buffers (rotary tables, ...) on `device`."""
    with parameters_on_meta():
        module = build()
    for owner in module.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            owner._buffers[key] = buffer.to(device)
    return module


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters registered inside live on the meta device; tying modules to one another still ties."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def dtype_to_fill(parameter: nn.Parameter, compute: torch.dtype) -> torch.dtype:
    """What the value of a parameter arrives in: what is trained in fp32, what is frozen in the dtype of
    computing, and whole numbers (packed weights) as they are."""
    if not parameter.is_floating_point():
        return parameter.dtype
    return torch.float32 if parameter.requires_grad else compute


def places(module: nn.Module) -> Places:
    """Every parameter of `module` and where it hangs, in the order of `named_parameters`."""
    found: Places = {}
    for owner in module.modules():
        for key, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(parameter, []).append((owner, key))
    return found


def hang(parameter: nn.Parameter, where: Collection[tuple[nn.Module, str]]) -> None:
    """Put `parameter` in all its places, so that what was tied stays tied."""
    for owner, key in where:
        owner._parameters[key] = parameter


def arriving(world: World, weights: Weights, names: Collection[str]) -> Iterator[tuple[str, Tensor | None]]:
    """The names that rank 0's `weights` yields, on every rank; the values on rank 0 alone.

    Raises ValueError unless they are exactly `names`, each once.
    """
    missing = set(names)
    source = iter(weights()) if world.rank == 0 else iter(())
    while True:
        name, value = next(source, (None, None))
        name = world.broadcast(name)
        if name is None:
            break
        if name not in missing:
            raise ValueError(f"weights() gave {name!r}, which the model lacks or which came before")
        missing.remove(name)
        yield name, value
    if missing:
        raise ValueError(f"weights() gave no value for {', '.join(sorted(missing))}")


def optimizer_over(factory: OptimizerFactory, parts: Mapping[str, Part]) -> torch.optim.Optimizer:
    """The caller's optimizer, made from whole shapes and stepping on the parts' masters.

    The factory decides by name and number of dimensions, so it gets stand-ins without memory, and
    the masters take their places in its groups.
    """
    stand_ins = {name: nn.Parameter(torch.empty(part.shape, device="meta")) for name, part in parts.items()}
    real = {stand_ins[name]: part.master for name, part in parts.items()}
    optimizer = factory(stand_ins.items())
    for group in optimizer.param_groups:
        group["params"] = [real[stand_in] for stand_in in group["params"]]
    return optimizer


def update(
    optimizer: torch.optim.Optimizer,
    gradients: Collection[tuple[nn.Parameter, Tensor]],
    *,
    norm: float,
    lr: float,
    max_grad_norm: float | None,
) -> bool:
    """One update of masters from their gradients (fp32, same shapes, scaled in place). Applied?

    `norm` is the global norm of the gradients, alike on all ranks, and with it the decision: when it
    is not finite nothing is touched. Skipping selects. Multiplying the gradient by zero would not
    do: 0 * NaN is NaN, and AdamW's moments never lose it.
    """
    if not math.isfinite(norm):
        return False
    if max_grad_norm is not None and norm > max_grad_norm:
        # the 1e-6 of torch.nn.utils.clip_grad_norm_, for equal trajectories
        torch._foreach_mul_([gradient for _, gradient in gradients], max_grad_norm / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    for master, gradient in gradients:
        master.grad = gradient
    optimizer.step()
    for master, _ in gradients:
        master.grad = None
    return True


def sum_of_squares(tensors: Collection[Tensor], device: torch.device) -> Tensor:
    """Scalar, float64, on `device`: the sum over all elements of fp32 `tensors`.

    torch's fp32 norm of a whole tensor adds in few accumulators on the CPU: 2e-3 too small at 3e7
    elements. Norms of short rows, squared and added in float64, are as fast and right to 1e-6.
    """
    norms = [torch.zeros(1, device=device)]
    for tensor in tensors:
        rest = tensor.numel() % ROW
        flat = tensor.reshape(-1)
        norms.append(torch.linalg.vector_norm(flat[: flat.numel() - rest].view(-1, ROW), dim=1))
        norms.append(torch.linalg.vector_norm(flat[flat.numel() - rest :]).view(1))
    return torch.cat(norms).double().square().sum()


def values(optimizer: torch.optim.Optimizer, part: Part) -> dict[str, Tensor]:
    """Views [n] of a part's master and moments; the moments are made if no update was yet."""
    state = optimizer.state[part.master]
    if not state:
        group = next(g for g in optimizer.param_groups if any(p is part.master for p in g["params"]))
        on_device = group.get("fused") or group.get("capturable")
        state["step"] = torch.zeros((), device=part.master.device if on_device else "cpu")
        state["exp_avg"] = torch.zeros_like(part.master, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(part.master, requires_grad=False)
    moments = {FIRST: state["exp_avg"], SECOND: state["exp_avg_sq"]}
    return {MASTER: part.master.detach().view(-1)} | {key: value.view(-1) for key, value in moments.items()}


def slices(optimizer: torch.optim.Optimizer, parts: Mapping[str, Part]) -> dict[str, list[Slice]]:
    """Views of all that this rank holds, whether it is this rank's to save or not."""
    return {name: [Slice(part.first, values(optimizer, part))] for name, part in parts.items()}


def snapshot(optimizer: torch.optim.Optimizer, parts: Mapping[str, Part], updates: int) -> EngineState:
    """Copies on the CPU of what this rank owns of masters and moments."""
    shards: dict[str, list[Shard]] = {}
    for name, part in parts.items():
        mine = slice(part.start - part.first, part.stop - part.first)
        copies = {which: value[mine].to("cpu", copy=True) for which, value in values(optimizer, part).items()}
        shards[name] = [Shard(part.shape, part.start, copies)] if part.stop > part.start else []
    return EngineState(updates, shards)


def restore(optimizer: torch.optim.Optimizer, parts: Mapping[str, Part], updates: int, read: Read) -> None:
    """Fill masters and moments, bit for bit, with what `read` finds, and AdamW's `step` with `updates`."""
    for name, part in parts.items():
        for which, value in values(optimizer, part).items():
            value.copy_(read(name, which, part.first, part.first + value.numel()))
        optimizer.state[part.master]["step"].fill_(updates)


def call(module: nn.Module, batch: Any, device: torch.device, **options: Any) -> Any:
    """A forward pass on `batch`, moved to `device` if it can be."""
    return module(batch.to(device) if hasattr(batch, "to") else batch, **options)


@contextlib.contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; the module's mode comes back afterwards."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)
