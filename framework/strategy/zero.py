"""DeepSpeed ZeRO behind our engine: gradients that add, state by name, skips alike on every rank.

DeepSpeed keeps the fp32 masters of many parameters in few flat tensors; a `Piece` says where the
elements of one parameter lie in them, and everything that reads or writes state goes through pieces.
DeepSpeed is asked for sharding, gathering and reducing only: micro-batches, learning rates, clipping
limits, norms, counters and checkpoints are ours.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.errors import SapwoodError
from framework.strategy import common, zero_setup
from framework.strategy.base import (
    FIRST,
    MASTER,
    SECOND,
    Build,
    Engine,
    EngineState,
    OptimizerFactory,
    Read,
    Shard,
    Slice,
    Weights,
    World,
)
from framework.strategy.common import COMPUTE, Part
from framework.strategy.ddp import Ddp
from framework.strategy.frozen import Frozen
from framework.strategy.linear import keeping_parameters
from framework.strategy.memory import PLAIN, Blocks, prepare_blocks
from framework.strategy.world import form_group
from framework.strategy.zero_options import Offload, PlusPlus


@dataclass(frozen=True)
class Zero:
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) by DeepSpeed, over all ranks of `world`.

    `stage` shards moments and masters (1), gradients too (2), weights too (3). `precision` is "fp32"
    or "bf16"; `blocks` says how blocks are computed. Every parameter that is trained must take part in
    every micro-batch on all ranks or on none. `options` are of stage 3 alone.

    One rank has nothing to shard: unless it offloads, a world of one trains replicated (`Ddp`), with the
    same numbers. `train` raises ConfigError when DeepSpeed is missing or too old, or when this machine cannot
    do what `options` ask for.
    """

    world: World
    stage: int = 3
    precision: str = "bf16"
    blocks: Blocks = PLAIN
    options: Offload | PlusPlus | None = None

    def train(self, build: Build, weights: Weights, optimizer: OptimizerFactory) -> Engine:
        if self._alone:
            return Ddp(self.world, self.precision, self.blocks).train(build, weights, optimizer)
        deepspeed, config, module, masters = self._spread(build, weights, train=True)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}
        parts = {name: Part(shapes[name], 0, parameter, 0, 0) for name, parameter in trained.items()}
        engine = zero_setup.initialize(
            deepspeed,
            module.train(),
            optimizer=common.optimizer_over(optimizer, parts),
            config=config,
        )
        zero_setup.measure_as_we_do(engine.optimizer, self.world)
        return ZeroEngine(self.world, self.stage, engine, trained, shapes, masters)

    def freeze(self, build: Build, weights: Weights) -> Frozen:
        """Sharded like trained weights under stage 3; whole on every rank under stages 1 and 2."""
        if self._alone or self.stage < 3:
            return Ddp(self.world, self.precision).freeze(build, weights)
        deepspeed, config, module, _ = self._spread(build, weights, train=False)
        return ZeroFrozen(self.world, zero_setup.initialize(deepspeed, module, config=config))

    @property
    def _alone(self) -> bool:
        return self.world.size == 1 and not isinstance(self.options, Offload)

    def _spread(
        self, build: Build, weights: Weights, *, train: bool
    ) -> tuple[Any, dict[str, Any], nn.Module, Any]:
        """The package, its configuration, the filled module, and what rounding took (see `_fill`)."""
        deepspeed = zero_setup.package(self.world)
        form_group(self.world)
        module = common.build_on_meta(build, self.world.device)
        keys = {} if self.options is None else self.options.sections(module, self.world, train=train)
        config = zero_setup.deepspeed_config(stage=self.stage, precision=self.precision, options=keys)
        if train:
            prepare_blocks(module, self.blocks)
        else:
            module.requires_grad_(False)
        with zero_setup.silent():
            os.environ.setdefault("LOCAL_RANK", str(self.world.local_rank))  # `zero.Init` reads it
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
            shard = zero_setup.sharding(deepspeed, config) if self.stage == 3 else None
        masters = _fill(self.world, module, weights, COMPUTE[self.precision], shard)
        return deepspeed, config, module, masters


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that this rank owns, inside one of DeepSpeed's flat tensors."""

    group: int  # which of the flat tensors: [F] fp32 masters of many parameters
    offset: int  # where the piece begins in it
    start: int  # the same element's index in the flattened parameter
    length: int

    def of(self, values: Tensor) -> Tensor:
        """The piece of `values`, [F] laid out like the flat tensor: a view."""
        return values.detach()[self.offset : self.offset + self.length]


class ZeroEngine:
    """A model trained by DeepSpeed. See `framework.strategy.base.Engine`."""

    def __init__(
        self,
        world: World,
        stage: int,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, tuple[int, ...]],
        masters: Mapping[str, tuple[int, Tensor]],
    ) -> None:
        """`masters`: (first element, values) of what rounding to the compute dtype would lose."""
        self.world = world
        self.trained = shapes
        self._stage = stage
        self._engine = engine
        self._sharded = engine.optimizer
        self._on_disk = getattr(self._sharded, "swap_optimizer", False)
        self._ids = {name: getattr(parameter, "ds_id", -1) for name, parameter in parameters.items()}
        self._updates = 0
        weakref.finalize(self, zero_setup.destroy, engine).atexit = False
        find = self._piece_of_shard if stage == 3 else self._piece_of_partition
        self._pieces = {name: find(parameter) for name, parameter in parameters.items()}
        # where the masters of each lie, also on a rank that owns none of them
        self._groups: dict[str, int] = {}
        if stage == 3:
            place = self._sharded.grad_position
            self._groups = {n: place[self._sharded.get_param_id(p)][0] for n, p in parameters.items()}
        for group, names in self._by_group(masters):
            with zero_setup.fetched(self._sharded, group):
                for name, piece in names:
                    first, values = masters[name]
                    begin = piece.start - first
                    piece.of(self._flats()[group]).copy_(values[begin : begin + piece.length])

    @property
    def updates(self) -> int:
        return self._updates

    @contextlib.contextmanager
    def micro(self, *, last: bool) -> Iterator[None]:
        with keeping_parameters() if self._stage == 3 else contextlib.nullcontext():
            yield

    def __call__(self, batch: Any, **options: Any) -> Any:
        return common.call(self._engine, batch, self.world.device, **options)

    def backward(self, loss: Tensor) -> None:
        # Without this, ZeRO-3 overwrites the gradients of earlier backward passes whenever it did not
        # see a forward pass in between.
        self._sharded.clear_backward_seen_flag()
        # times the world: DeepSpeed takes the mean over ranks
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, *, lr: float, max_grad_norm: float | None) -> float:
        for group in self._sharded.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._sharded.clip_grad = max_grad_norm or 0.0
        if self._on_disk:
            self._expect_every_gradient()
        self._engine.step()
        if self._stage == 3:
            # Left as it is, a parameter that a later first micro-batch does not touch would get this
            # step's gradient again.
            self._sharded.grad_partitions_flat_buffer.zero_()
            for flat in self._flats():
                if flat.grad is not None:  # offloaded masters keep theirs
                    flat.grad.zero_()
        self._updates += self._engine.was_step_applied()
        return float(self._engine.get_global_grad_norm())

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        with common.inference(self._engine):
            yield
        self._release()

    def weights(self, *, without: str | None = None) -> Iterator[tuple[str, Tensor]]:
        named = dict(common.named(self._engine.module.named_parameters(), without))
        order = list(named)
        if self._on_disk:  # then every flat tensor is read once
            order.sort(key=lambda name: self._groups.get(name, -1))
        for group, names in itertools.groupby(order, key=lambda name: self._groups.get(name, -1)):
            with zero_setup.fetched(self._sharded, group) if group >= 0 else contextlib.nullcontext():
                for name in names:
                    yield name, self._whole(name) if name in self.trained else self._frozen(named[name])

    @contextlib.contextmanager
    def held(self) -> Iterator[Mapping[str, Sequence[Slice]]]:
        slices: dict[str, list[Slice]] = {name: [] for name in self.trained}
        with contextlib.ExitStack() as fetched:
            for group, names in self._by_group(self.trained):
                state = fetched.enter_context(self._state(group))
                for name, piece in names:
                    values = {which: piece.of(flat) for which, flat in state.items()}
                    slices[name].append(Slice(piece.start, values))
            yield slices
        self._round()

    def state_dict(self) -> EngineState:
        shards: dict[str, list[Shard]] = {name: [] for name in self.trained}
        for group, names in self._by_group(self.trained):
            with self._state(group) as state:
                for name, piece in names:
                    copies = {which: piece.of(values).to("cpu", copy=True) for which, values in state.items()}
                    shards[name].append(Shard(self.trained[name], piece.start, copies))
        return EngineState(self._updates, shards)

    def load_state_dict(self, updates: int, read: Read) -> None:
        owned = dict(self._by_group(self.trained))
        for group, flat in enumerate(self._flats()):  # one of which this rank owns nothing steps on padding
            with self._state(group) as state:
                for name, piece in owned.get(group, []):
                    for which, values in state.items():
                        read_here = read(name, which, piece.start, piece.start + piece.length)
                        piece.of(values).copy_(read_here)
                self._sharded.optimizer.state[flat]["step"].fill_(updates)
        self._updates = updates
        self._round()

    def _by_group(self, names: Collection[str]) -> list[tuple[int, list[tuple[str, Piece]]]]:
        """This rank's pieces of `names` by flat tensor, so that each is fetched once."""
        found: dict[int, list[tuple[str, Piece]]] = {}
        for name in names:
            for piece in self._pieces[name]:
                found.setdefault(piece.group, []).append((name, piece))
        return list(found.items())

    def _piece_of_shard(self, parameter: Any) -> list[Piece]:
        """ZeRO-3 cuts every parameter into equal parts, the last one padded."""
        group, offset, size = self._sharded.grad_position[self._sharded.get_param_id(parameter)]
        start = self.world.rank * size
        length = min(size, parameter.ds_numel - start)
        return [Piece(group, offset, start, length)] if length > 0 else []

    def _piece_of_partition(self, parameter: Any) -> list[Piece]:
        """ZeRO-1 and 2 cut the concatenation of all parameters of a group into equal parts."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        return [Piece(mapping.param_group_index, place.start, inside.start, inside.numel)]

    def _flats(self) -> list[Tensor]:
        """This rank's share of the fp32 masters, one tensor [F] per group of parameters."""
        if self._stage == 3:
            return self._sharded.fp32_partitioned_groups_flat
        if hasattr(self._sharded, "fp32_groups_flat_partition"):  # the optimizer of ZeRO-1 in bf16
            return self._sharded.fp32_groups_flat_partition
        return self._sharded.single_partition_of_fp32_groups

    @contextlib.contextmanager
    def _state(self, group: int) -> Iterator[dict[str, Tensor]]:
        """The masters [F] and AdamW's moments [F] of one flat tensor, made if no update was yet."""
        flat = self._flats()[group]
        with zero_setup.fetched(self._sharded, group):
            state = self._sharded.optimizer.state[flat]
            if not state:
                state["step"] = torch.zeros((), device=flat.device)  # where a fused AdamW wants it
                state["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(flat, requires_grad=False)
            yield {MASTER: flat, FIRST: state["exp_avg"], SECOND: state["exp_avg_sq"]}

    def _round(self) -> None:
        """Make the compute weights the rounded masters."""
        if self._stage < 3:
            self._sharded.update_lp_params()
            return
        self._release()
        for group in range(len(self._flats())):
            with zero_setup.fetched(self._sharded, group):
                self._sharded._reassign_or_swap_out_partitioned_parameters(group)
        self._sharded.invalidate_secondary_tensor()  # a second copy would be of the weights before

    def _release(self) -> None:
        """Drop gathered weights: a forward pass leaves them to a backward pass that may not come."""
        if self._stage == 3:
            self._sharded._partition_all_parameters()

    def _expect_every_gradient(self) -> None:
        """Of a parameter without one DeepSpeed would read the file of an earlier step."""
        there = self._sharded._offload_boundary_param_ids
        for name, pieces in self._pieces.items():
            if pieces and self._ids[name] not in there:
                raise SapwoodError(
                    f"{name} got no gradient in this step, and strategy.optimizer=nvme would take an earlier "
                    "one for it; type strategy.optimizer=cpu"
                )

    def _frozen(self, parameter: nn.Parameter) -> Tensor:
        if self._stage < 3:
            return parameter.detach()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _whole(self, name: str) -> Tensor:
        """One trained parameter in fp32, from its masters on all ranks."""
        shape = self.trained[name]
        whole = torch.zeros(math.prod(shape), device=self.world.device)
        for piece in self._pieces[name]:
            whole[piece.start : piece.start + piece.length] = piece.of(self._flats()[piece.group])
        # Every element has one owner and is zero elsewhere; as integers, its bits add up exactly.
        dist.all_reduce(whole.view(torch.int32))
        return whole.view(shape)


class ZeroFrozen(Frozen):
    """A model that DeepSpeed shards and gathers without an optimizer."""

    def __init__(self, world: World, engine: Any) -> None:
        super().__init__(world, engine, dict(engine.module.named_parameters()), self._put_piece)
        self._release = engine.optimizer.partition_all_parameters
        weakref.finalize(self, zero_setup.destroy, engine).atexit = False

    def __call__(self, batch: Any, **options: Any) -> Any:
        answer = super().__call__(batch, **options)
        self._release()  # what was gathered ahead for a module that this forward pass left out
        return answer

    def _put_piece(self, parameter: Any, whole: Tensor) -> None:
        piece = parameter.ds_tensor  # [ceil(n / world)], padded at the end of the last one
        mine = whole.reshape(-1)[self.world.rank * piece.numel() :][: piece.numel()]
        piece[: mine.numel()].copy_(mine)
        parameter.ds_secondary_tensor = None  # a second copy would be of the weights before


def _fill(
    world: World, module: nn.Module, weights: Weights, compute: torch.dtype, shard: Any
) -> dict[str, tuple[int, Tensor]]:
    """Give the meta parameters of `module` rank 0's values, one after the other.

    `shard` is a `deepspeed.zero.Init` (each rank keeps its part of a parameter) or None (each keeps
    all). Returns what rounding to `compute` has lost of the masters: by name, the index of this
    rank's first element and fp32 values from there on.
    """
    named = dict(module.named_parameters())
    where = common.places(module)
    masters = {}
    for name, value in common.arriving(world, weights, named):
        empty = named[name]
        whole = torch.empty(empty.shape, dtype=common.dtype_to_fill(empty, compute), device=world.device)
        if value is not None:
            whole.copy_(value.reshape(empty.shape))
        dist.broadcast(whole, src=0)
        kept = whole.to(compute) if empty.requires_grad else whole
        parameter: Any = nn.Parameter(kept, requires_grad=empty.requires_grad)
        if empty.requires_grad and not torch.equal(parameter.float(), whole):
            size = whole.numel() if shard is None else -(-whole.numel() // world.size)
            first = 0 if shard is None else world.rank * size
            masters[name] = first, whole.flatten()[first : first + size].clone()
        if shard is not None:
            shard._convert_to_deepspeed_param(parameter)
            parameter.partition()
        common.hang(parameter, where[empty])
    return masters
