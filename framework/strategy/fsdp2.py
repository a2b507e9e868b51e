"""Fully sharded training (PyTorch FSDP2; Zhao et al. 2023, arXiv 2304.11277): every rank keeps a few
rows of each parameter, its gradient and its moments, and gathers a block's weights while it computes.

The sharded fp32 rows are the masters; gathering rounds them to the compute dtype. The optimizer steps
on the plain local rows, not on DTensors: same arithmetic, no dispatch, and state by name for free.

Where several groups of ranks hold a copy of the model each (HSDP), FSDP2 knows of one copy, and gradients
are added over copies once per optimizer step, when they are complete. FSDP2's own way does so in every
micro-batch, and put off (`set_requires_all_reduce`) it loses the gradients of a block that the last
micro-batch leaves out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from framework.strategy import common
from framework.strategy.base import (
    Build,
    Engine,
    EngineState,
    OptimizerFactory,
    Read,
    Shardable,
    Slice,
    Weights,
    World,
)
from framework.strategy.common import COMPUTE, Part
from framework.strategy.ddp import Ddp
from framework.strategy.exchange import SumByExchange
from framework.strategy.frozen import Frozen
from framework.strategy.memory import PLAIN, Blocks, prepare_blocks
from framework.strategy.mesh import Mesh, mesh_of, ranks_of_a_host
from framework.strategy.world import form_group


@dataclass(frozen=True)
class Fsdp:
    """Parameters, gradients and moments sharded over ranks of `world`, by rows.

    `precision` is "fp32" or "bf16"; `blocks` says how blocks are computed.
    `reshard_after_forward` true spends least memory: a block's weights are dropped after its forward
    pass, and its gradients are reduced after every micro-batch. False spends least communication:
    weights stay gathered from the first micro-batch of a step to the last, and gradients are kept
    whole (4 bytes a parameter) and reduced once.

    `shards` ranks, a divisor of the world, share a copy of the model; the others hold copies of it. "host"
    is the ranks of one host (HSDP), None all ranks.

    `offload` keeps a rank's rows, their gradients and moments in the memory of the host, pinned where the
    device is another one, and updates them there. A block's rows are copied to the device when gathered.

    Bytes per trained parameter on each of w ranks that share a copy: 16 / w, on the host if offloaded, and
    on the device the gathered blocks. One rank has nothing to shard: without `offload` a world of one trains
    replicated (`Ddp`), with the same numbers.
    """

    world: World
    precision: str = "bf16"
    blocks: Blocks = PLAIN
    reshard_after_forward: bool = True
    shards: int | Literal["host"] | None = None
    offload: bool = False

    @property
    def _home(self) -> torch.device:
        """Where rows are kept."""
        return torch.device("cpu") if self.offload else self.world.device

    def train(self, build: Build, weights: Weights, optimizer: OptimizerFactory) -> Engine:
        if self.world.size == 1 and not self.offload:
            return Ddp(self.world, self.precision, self.blocks).train(build, weights, optimizer)
        module = common.build_on_meta(build, self.world.device)
        prepare_blocks(module, self.blocks)
        mesh = self._mesh()
        # the backward pass begins with the head: dropping it after the forward pass would be for nothing
        self._shard(module, mesh, drop_blocks=self.reshard_after_forward, drop_rest=False)
        _materialize(module, self._home)
        parameters = cast(dict[str, nn.Parameter], dict(module.named_parameters()))
        _fill(self.world, mesh, parameters, weights)
        return FsdpEngine(
            self.world,
            mesh,
            module.train(),
            parameters,
            optimizer,
            gathered_per_step=not self.reshard_after_forward,
        )

    def freeze(self, build: Build, weights: Weights) -> Frozen:
        """2 / w bytes per parameter on each of w ranks of a copy in bf16, 4 / w in fp32, and the gathered
        blocks."""
        if self.world.size == 1 and not self.offload:
            return Ddp(self.world, self.precision).freeze(build, weights)
        module = common.build_on_meta(build, self.world.device).requires_grad_(False)
        mesh = self._mesh()
        self._shard(module, mesh, drop_blocks=True, drop_rest=True)
        _materialize(module, self._home)
        parameters = cast(dict[str, nn.Parameter], dict(module.named_parameters()))
        _fill(self.world, mesh, parameters, weights)

        def put(parameter: Any, whole: Tensor) -> None:
            part = _part(mesh, parameter)
            rows = part.master.numel()
            part.master.view(-1).copy_(whole.reshape(-1)[part.first : part.first + rows])

        return Frozen(self.world, module, parameters, put)

    def _mesh(self) -> Mesh:
        form_group(self.world)
        shards = ranks_of_a_host(self.world) if self.shards == "host" else self.shards
        return mesh_of(self.world, shards or self.world.size)

    def _shard(self, module: nn.Module, mesh: Mesh, *, drop_blocks: bool, drop_rest: bool) -> None:
        """One unit per block; the rest (embedding, last norm, head) is one more, so ties hold.

        `drop_...`: whether gathered weights are dropped after the forward pass.
        """
        compute = COMPUTE[self.precision]
        for parameter, where in common.places(module).items():
            dtype = common.dtype_to_fill(parameter, compute)
            empty = torch.empty(parameter.shape, dtype=dtype, device="meta")
            common.hang(nn.Parameter(empty, requires_grad=parameter.requires_grad), where)
        options: dict[str, Any] = {
            "mesh": mesh.over_shards,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,  # weights of the loss and rotary tables stay fp32
            ),
        }
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.world.device.type != "cpu")
        for block in cast(Shardable, module).blocks():
            fully_shard(block, reshard_after_forward=drop_blocks, **options)
        fully_shard(module, reshard_after_forward=drop_rest, **options)
        for unit in _units(module):
            # gradients add; plain sums are also the one reduction that every backend has
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            if self.world.device.type == "cpu":
                unit.set_custom_reduce_scatter(cast(Any, SumByExchange()))


class FsdpEngine:
    """A sharded model in training. See `framework.strategy.base.Engine`."""

    def __init__(
        self,
        world: World,
        mesh: Mesh,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: OptimizerFactory,
        *,
        gathered_per_step: bool,
    ) -> None:
        """`parameters` are all sharded parameters by name, DTensors cut by rows."""
        self.world = world
        self._mesh = mesh
        self._module = module
        self._root = cast(FSDPModule, module)
        self._parameters = parameters
        self._gathered_per_step = gathered_per_step
        self._parts = {name: _part(mesh, p) for name, p in parameters.items() if p.requires_grad}
        self.trained: Mapping[str, tuple[int, ...]] = {name: part.shape for name, part in self._parts.items()}
        self._optimizer = common.optimizer_over(optimizer, self._parts)
        self._updates = 0

    @property
    def updates(self) -> int:
        return self._updates

    @contextlib.contextmanager
    def micro(self, *, last: bool) -> Iterator[None]:
        if self._gathered_per_step:
            self._root.set_requires_gradient_sync(last)
            self._root.set_reshard_after_backward(last)
        self._root.set_is_last_backward(last)
        yield

    def __call__(self, batch: Any, **options: Any) -> Any:
        return common.call(self._module, batch, self.world.device, **options)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, *, lr: float, max_grad_norm: float | None) -> float:
        self._release()
        gradients = [(part.master, self._gradient(name)) for name, part in self._parts.items()]
        mine = [gradient for _, gradient in gradients]
        self._mesh.add_over_copies(mine, self.world.device)
        counted = mine if self._mesh.copy == 0 else []  # copies hold the same gradients
        squares = common.sum_of_squares(counted, mine[0].device).to(self.world.device)
        dist.all_reduce(squares)
        norm = math.sqrt(squares.item())
        if common.update(self._optimizer, gradients, norm=norm, lr=lr, max_grad_norm=max_grad_norm):
            self._updates += 1
        for name in self._parts:
            self._parameters[name].grad = None
        return norm

    def inference(self) -> contextlib.AbstractContextManager[None]:
        return common.inference(self._module)

    def weights(self, *, without: str | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in common.named(self._parameters.items(), without):
            yield name, cast(DTensor, parameter.detach().to(self.world.device)).full_tensor()

    @contextlib.contextmanager
    def held(self) -> Iterator[Mapping[str, Sequence[Slice]]]:
        self._release()
        yield common.slices(self._optimizer, self._parts)

    def state_dict(self) -> EngineState:
        return common.snapshot(self._optimizer, self._parts, self._updates)

    def load_state_dict(self, updates: int, read: Read) -> None:
        self._release()
        common.restore(self._optimizer, self._parts, updates, read)
        self._updates = updates

    def _gradient(self, name: str) -> Tensor:
        """The local rows of a gradient; zero where no loss reached the parameter, as in `Ddp`."""
        gradient = self._parameters[name].grad
        if gradient is None:
            return torch.zeros_like(self._parts[name].master, requires_grad=False)
        return cast(DTensor, gradient).to_local()

    def _release(self) -> None:
        """Drop gathered weights: what a forward pass leaves behind must not outlive a change of masters."""
        for unit in _units(self._module):
            unit.reshard()


def _units(module: nn.Module) -> list[FSDPModule]:
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]


def _rows(mesh: Mesh, parameter: nn.Parameter) -> int:
    """Rows of every shard but the last ones, which may have fewer or none."""
    return -(-parameter.shape[0] // mesh.shards)


def _part(mesh: Mesh, parameter: nn.Parameter) -> Part:
    """The rows of this rank: a plain tensor that shares their memory."""
    local = cast(DTensor, parameter.detach()).to_local()
    whole = math.prod(parameter.shape)
    first = min(mesh.shard * _rows(mesh, parameter) * math.prod(parameter.shape[1:]), whole)
    start, stop = mesh.own(local.numel())
    return Part(tuple(parameter.shape), first, nn.Parameter(local), first + start, first + stop)


def _materialize(module: nn.Module, device: torch.device) -> None:
    """Memory for this rank's rows; buffers, which are real already, stay."""
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def _fill(world: World, mesh: Mesh, parameters: Mapping[str, nn.Parameter], weights: Weights) -> None:
    """Scatter rank 0's values, one parameter at a time.

    Rank 0 holds one whole parameter besides its shard (twice, where the rows do not divide evenly
    or the device is not the CPU); the others never hold more than their rows.
    """
    for name, value in common.arriving(world, weights, parameters):
        parameter = parameters[name]
        rows = _rows(mesh, parameter)
        mine = torch.empty(rows, *parameter.shape[1:], dtype=parameter.dtype, device=world.device)
        pieces = None
        if value is not None:
            whole = value.reshape(parameter.shape).to(world.device, parameter.dtype)
            missing = rows * mesh.shards - whole.shape[0]
            if missing:
                whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
            shards = whole.contiguous().split(rows)
            pieces = [shards[mesh.piece_of(rank)] for rank in range(world.size)]
        dist.scatter(mine, pieces, src=0)
        local = cast(DTensor, parameter.detach()).to_local()
        local.copy_(mine[: local.shape[0]])
