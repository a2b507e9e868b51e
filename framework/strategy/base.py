"""The contract of a strategy: how a model is spread over ranks and how gradients add up.

A strategy knows nothing of losses. It promises that gradients of `backward` *add* over ranks and
micro-batches, that `step` decides alike on every rank, and that its state is keyed by parameter name
in one layout (flat fp32 slices), so that a run stopped under one strategy goes on under another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class World(Protocol):
    """The ranks that train together. A world of one needs no process group.

    Every method is collective: all ranks call it, in the same order, and get the same answer.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over ranks, in float64."""

    def max(self, values: Sequence[float]) -> list[float]:
        """Elementwise maximum over ranks, in float64."""

    def gather(self, value: Any) -> list[Any]:
        """A JSON-able value of each rank, in rank order, on every rank."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-able value on every rank."""

    def barrier(self) -> None: ...

    def close(self) -> None:
        """Leave the process group. Not collective on failure paths."""


class Shardable(Protocol):
    """What a strategy asks of a model besides being an `nn.Module`."""

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated layers, in order: the units of sharding and of activation checkpointing."""


Build = Callable[[], nn.Module]
"""Makes the model's structure. The strategy calls it where it wants the parameters to be born."""

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""Called on rank 0 only: every parameter once, whole, on the CPU, under its name in the built model."""

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""Gets (name, parameter) of what is trained; returns AdamW whose groups carry an `lr_scale`."""

MASTER, FIRST, SECOND = "master", "exp_avg", "exp_avg_sq"
"""Names of the three values of a parameter: fp32 master weight and AdamW's two moments."""


@dataclass(frozen=True)
class Shard:
    """A contiguous piece of one parameter, flattened in row-major order, owned by this rank alone."""

    shape: tuple[int, ...]  # of the whole parameter
    start: int  # first element of the flattened parameter
    values: Mapping[str, Tensor]  # MASTER, FIRST, SECOND -> [n] fp32 on the CPU, snapshots


@dataclass(frozen=True)
class Slice:
    """What a rank holds of one parameter, flattened and contiguous: views, which may be written to."""

    start: int  # first element of the flattened parameter
    values: Mapping[str, Tensor]  # MASTER, FIRST, SECOND -> [n] fp32, where they are kept


@dataclass(frozen=True)
class EngineState:
    """This rank's share of the training state. Over all ranks the shards cover each element once."""

    updates: int  # optimizer updates applied (skipped ones not counted): AdamW's `step`
    shards: Mapping[str, Sequence[Shard]]  # trained parameters by name; a rank may own none of one


Read = Callable[[str, str, int, int], Tensor]
"""read(name, which, start, stop) -> [stop - start] fp32 slice of a saved flattened value."""


class Engine(Protocol):
    """One trained model on all ranks."""

    world: World
    trained: Mapping[str, tuple[int, ...]]  # names and whole shapes of what is trained

    @property
    def updates(self) -> int:
        """Updates applied so far: skipped ones are not counted."""

    def micro(self, *, last: bool) -> AbstractContextManager[None]:
        """Wraps forward and backward of one micro-batch; `last` ends the optimizer step."""

    def __call__(self, batch: Any, **options: Any) -> Any:
        """Every forward goes through here: the engine moves `batch` to the device.

        `options` are handed to the model's `forward` (such as `needs`, see `models.policy`).
        """

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` over micro-batches and ranks. No averaging anywhere."""

    def step(self, *, lr: float, max_grad_norm: float | None) -> float:
        """Clip, update, clear gradients. Returns the global norm before clipping.

        A norm that is not finite means the update was skipped, on all ranks alike, with weights,
        masters and moments untouched bit for bit.
        """

    def inference(self) -> AbstractContextManager[None]:
        """No gradients, dropout off."""

    def weights(self, *, without: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, whole, under its name in the built model, on every rank.

        Those whose names begin with `without` are left out and cost nothing. Collective: all ranks iterate to
        the end. Trained parameters in fp32 (the masters), frozen ones in their own dtype. A tensor is valid
        until the next one is asked for.
        """

    def held(self) -> AbstractContextManager[Mapping[str, Sequence[Slice]]]:
        """What this rank holds of each trained parameter, to be read or changed inside.

        Collective. Ranks that hold the same elements must change them alike. What the model computes with
        follows the masters at the end.
        """

    def state_dict(self) -> EngineState: ...

    def load_state_dict(self, updates: int, read: Read) -> None:
        """Fetch this rank's slices with `read`, which must be exact: reloading is bitwise."""


class Frozen(Protocol):
    """A model that is only asked, never trained: a reference, a reward model."""

    world: World

    def __call__(self, batch: Any, **options: Any) -> Any:
        """The answer without gradients, dropout off. Collective where the weights are spread."""

    def refill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take other weights, whole and under the same names, such as `Engine.weights` gives. Collective.

        Raises ValueError unless they are every parameter once.
        """


class Strategy(Protocol):
    """A way of spreading a model over the ranks of a world."""

    @property
    def world(self) -> World: ...

    def train(self, build: Build, weights: Weights, optimizer: OptimizerFactory) -> Engine:
        """Build, spread, fill with `weights` (each rank gets its share only) and make trainable."""

    def freeze(self, build: Build, weights: Weights) -> Frozen:
        """A model in the precision of training that holds no gradients, masters or moments, spread
        in the same way."""
