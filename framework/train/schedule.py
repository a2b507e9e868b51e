"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore.

`step` counts from 0 and names the update that is about to be made; `total` is the number of updates
of the run. All schedules warm up linearly from base/warmup to base over the first `warmup` updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
"""Step (0-based) -> learning rate of that update."""


def _warm(step: int, warmup: int) -> float:
    # (step + 1): the first update is not wasted on a learning rate of zero.
    return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0


def _progress(step: int, start: int, total: int) -> float:
    """0 at `start`, 1 at `total`, clamped."""
    return min(1.0, max(0.0, (step - start) / max(1, total - start)))


def constant(step: int, *, total: int, warmup: int, min_ratio: float = 0.0, decay: int = 0) -> float:
    """1 after the warm-up."""
    return _warm(step, warmup)


def linear(step: int, *, total: int, warmup: int, min_ratio: float = 0.0, decay: int = 0) -> float:
    """Straight from 1 down to `min_ratio` at `total`."""
    return _warm(step, warmup) * (1.0 - (1.0 - min_ratio) * _progress(step, warmup, total))


def cosine(step: int, *, total: int, warmup: int, min_ratio: float = 0.0, decay: int = 0) -> float:
    """Half a cosine from 1 down to `min_ratio` at `total` (Loshchilov & Hutter 2017, without restarts)."""
    fall = 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup, total)))
    return _warm(step, warmup) * (min_ratio + (1.0 - min_ratio) * fall)


def wsd(step: int, *, total: int, warmup: int, min_ratio: float = 0.0, decay: int = 0) -> float:
    """Warm-up, stable, decay: 1 until the last `decay` updates, then 1 - sqrt down to `min_ratio`.

    The shape of the decay is Hägele et al. 2024 (2405.18392), section 3. The stable part does not
    depend on `total`, so a run can be lengthened without regret.
    """
    fall = 1.0 - math.sqrt(_progress(step, total - decay, total)) if decay > 0 else 1.0
    return _warm(step, warmup) * (min_ratio + (1.0 - min_ratio) * fall)


SHAPES = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}


def schedule(
    name: str, *, lr: float, total: int, warmup: int, min_ratio: float = 0.0, decay: int = 0
) -> Schedule:
    """The learning rate as a function of the step.

    `warmup` and `decay` are in updates, `min_ratio` in [0, 1] is the final share of `lr`.
    Raises KeyError for an unknown name; names are checked by the configuration's schema.
    """
    shape = SHAPES[name]
    return lambda step: lr * shape(step, total=total, warmup=warmup, min_ratio=min_ratio, decay=decay)
