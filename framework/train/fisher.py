"""How much the start model's answers hang on each weight: the diagonal of the Fisher information.

For EWC (Kirkpatrick et al. 2017, arXiv 1612.00796): what matters much for text that must not be forgotten is
held harder than what does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from framework.batch import Batch
from framework.losses.items import Objective
from framework.stages.base import Term
from framework.strategy.base import MASTER, SECOND, Engine
from framework.train.meter import Meter
from framework.train.protect import Values, copied, found
from framework.train.trainer import accumulate


def fisher(engine: Engine, objective: Objective, steps: Sequence[Sequence[Batch]]) -> Values:
    """Its diagonal at the weights as they are, over the mean of all its elements. Collective.

    `steps` are this rank's micro-batches of some rows each; the gradient of their mean loss is squared.
    AdamW's second moment adds the squares up, with updates of rate 0, and is emptied again afterwards: so it
    is the empirical Fisher information of small batches, of the last 1 / (1 - beta_2) of them mostly, alike
    under every strategy. Only for an engine that has made no update yet.
    """
    before = copied(engine)
    for number, micros in enumerate(steps):
        accumulate(engine, [Term(objective, micros)], seed=0, step=number, meter=Meter(engine.world))
        engine.step(lr=0.0, max_grad_norm=None)
    squares = copied(engine, SECOND)
    shards = engine.state_dict().shards  # each element once over all ranks
    total = math.fsum(float(s.values[SECOND].double().sum()) for each in shards.values() for s in each)
    (total,) = engine.world.sum([total])

    def read(name: str, which: str, start: int, stop: int) -> Tensor:
        return found(before, name, start, stop) if which == MASTER else torch.zeros(stop - start)

    engine.load_state_dict(0, read)
    count = sum(math.prod(shape) for shape in engine.trained.values())
    for parts in squares.values():
        for part in parts:
            part.values.mul_(count / total if total > 0 else 0.0)
    return squares
