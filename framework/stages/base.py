"""The contract of a stage: where an optimizer step's micro-batches come from and what they cost.

A stage knows no strategy; ranks meet in it only through `World`. It answers `next(step)` with terms;
each term has its own denominator, so adding replay or a pretraining term to any stage is adding a term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from framework.batch import Batch
from framework.losses.items import Objective


@dataclass(frozen=True)
class Term:
    """One addend of an optimizer step: scale * sum(weight * loss) / sum(units over all ranks)."""

    objective: Objective
    micros: Sequence[Batch]  # this rank's share; the same number on every rank
    scale: float = 1.0
    share: float | None = None  # of the norm of the other terms' gradient: what `scale` is to amount to
    name: str = ""  # of a term beside the stage's own; its metrics are reported as "<name>/<metric>"
    stats: Mapping[str, float] = field(default_factory=dict)  # of the global step, alike on all ranks


class Stage(Protocol):
    """A source of optimizer steps whose whole state fits in JSON.

    It may ask the engine for forward passes without gradients (`engine.inference()`) between steps, and
    the world for sums: what couples the units of a step (a group's mean, a baseline) is computed here,
    over all ranks, and handed to the loss as plain tensors.
    """

    def next(self, step: int) -> Sequence[Term]:
        """The terms of optimizer step `step` (0-based). Reinforcement learning rolls out in here."""

    @property
    def resting(self) -> bool:
        """Whether a checkpoint may be made now: not while a rollout is only half used up."""

    def reports(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """(kind, metrics) lines since the last call, such as ("rollout", {...}); alike on all ranks."""

    def held_out(self) -> Mapping[str, Term]:
        """Terms to evaluate without gradients, by the name of the data."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
