"""Held-out evaluation through the same objective that trains: no second definition of a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

from framework.stages.base import Term
from framework.strategy.base import Engine
from framework.train.meter import Sums, join


def evaluate(engine: Engine, held_out: Mapping[str, Term]) -> dict[str, float]:
    """Global weighted means of every held-out set, without gradients or dropout.

    Returns "<set>/loss" per unit, "<set>/units", "<set>/<metric>", and "<set>/perplexity" where the
    objective says that its loss is `in_nats` per token.
    Collective: every rank holds the same number of micro-batches of every set.
    """
    metrics: dict[str, float] = {}
    with engine.inference():
        for name, term in held_out.items():
            sums = Sums()
            for batch in term.micros:
                sums.add(term.objective(engine, batch), units=batch.units)
            means, weights = join(engine.world.gather(sums.tolist()))
            metrics |= {f"{name}/{key}": value for key, value in means.items()}
            metrics[f"{name}/units"] = weights["loss"]
            if getattr(term.objective, "in_nats", False):
                # exp(709) is the largest double: a diverged model reports inf, not an OverflowError.
                metrics[f"{name}/perplexity"] = math.exp(means["loss"]) if means["loss"] < 709 else math.inf
    return metrics
