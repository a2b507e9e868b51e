"""The coefficient of a term by what it does: the norm of its gradient as a share of that of all other terms.

    c = share * m(norm of the others) / m(norm of the term alone, with a coefficient of 1)

with m a moving average over measurements, one every so many steps. A raw coefficient that suits one loss,
model or length of answers does not suit another; a share does. A measurement costs another forward and
backward pass of the step, and changes nothing: gradients are taken by updates of rate 0, and moments are put
back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from framework.stages.base import Term
from framework.strategy.base import FIRST, MASTER, SECOND, Engine
from framework.train.meter import Meter
from framework.train.protect import copied, found
from framework.train.trainer import accumulate

MEMORY = 0.5  # weight of what was measured before


class Balance:
    """Scales the terms that ask for a `share`. `load_state_dict` takes what `state_dict` gave.

    `engine` must be one whose updates of rate 0 change no weight. Bytes per trained element of a rank while
    it measures, in the memory of the host: 12.
    """

    def __init__(self, engine: Engine, *, every: int) -> None:
        self.engine, self.every = engine, every
        self._norms: list[float] | None = None  # of the others, of the term alone
        self._measured = -1  # the step of the last measurement
        self.coefficient = 0.0

    def __call__(self, terms: Sequence[Term], *, seed: int, step: int) -> list[Term]:
        """The same terms with their scales, measured anew where that is due. Collective."""
        others, asking = (
            [t for t in terms if t.share is None],
            [replace(t, scale=1.0) for t in terms if t.share is not None],
        )
        if not (others and asking):
            return list(terms)
        if step % self.every == 0 and step != self._measured:
            self._measured = step
            now = norms(self.engine, [others, asking], seed=seed, step=step)
            if all(math.isfinite(norm) for norm in now):
                old = self._norms or now
                self._norms = [MEMORY * a + (1.0 - MEMORY) * b for a, b in zip(old, now, strict=True)]
        return [self._scaled(term) for term in terms]

    def _scaled(self, term: Term) -> Term:
        if term.share is None:
            return term
        own, alone = self._norms or (0.0, 0.0)
        self.coefficient = term.share * own / alone if alone > 0 else 0.0
        return replace(term, scale=self.coefficient)

    def line(self) -> dict[str, float]:
        """The coefficient in use, and the norms it is made of, as metrics."""
        if self._norms is None:
            return {}
        own, alone = self._norms
        return {"replay/coefficient": self.coefficient, "grad_norm_own": own, "grad_norm_replay": alone}

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self._norms, "measured": self._measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms, self._measured = state["norms"], state["measured"]


def norms(engine: Engine, groups: Sequence[Sequence[Term]], *, seed: int, step: int) -> list[float]:
    """Norm of the gradient of each group of terms by itself; inf or NaN where it is not finite. Collective.

    The engine comes out as it went in, bit for bit.
    """
    host = torch.device("cpu")
    updates = engine.updates
    before = {which: copied(engine, which, device=host) for which in (MASTER, FIRST, SECOND)}

    def read(name: str, which: str, start: int, stop: int) -> Tensor:
        return found(before[which], name, start, stop)

    answer = []
    for terms in groups:
        accumulate(engine, terms, seed=seed, step=step, meter=Meter(engine.world))
        answer.append(engine.step(lr=0.0, max_grad_norm=None))
    engine.load_state_dict(updates, read)
    return answer
