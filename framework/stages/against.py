"""Cross-entropy of given text, and how far the model has moved from the one it started from on it.

Of the start model no weights are kept: at every trained token its likeliest k tokens are, with all others as
one. The divergence of these k + 1 is at most the true KL, and all of it where the rest keeps its shape.
Letters: K trained positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from framework.batch import Batch, Distribution
from framework.losses.distill import truncated
from framework.losses.items import Items


class AgainstStart:
    """An objective per trained token: -log p, and the metric `kl`, KL(start || model), in nats.

    `remember` is called once for each batch while the engine holds the start weights; of a batch that was not
    remembered there is no `kl`. `vocabulary` is the number of rows of the head.
    """

    in_nats = True

    def __init__(self, *, vocabulary: int, likeliest: int = 64) -> None:
        self.asked = Distribution(vocabulary=vocabulary, temperature=1.0)
        self.likeliest = min(likeliest, vocabulary)
        self._said: dict[int, tuple[Batch, Tensor, Tensor]] = {}  # by the batch's identity: ids, nats [K, k]

    def remember(self, engine: Any, batch: Batch) -> Items:
        """The loss of the start model, whose likeliest tokens are kept on the CPU. Collective."""
        outputs = engine(
            batch.to(engine.world.device), distribution=replace(self.asked, likeliest=self.likeliest)
        )
        # the batch is kept, too, so that its identity cannot become another's
        self._said[id(batch)] = batch, outputs.candidate_ids.int().cpu(), outputs.candidate_logps.cpu()
        return Items(-outputs.logps, batch.weights.to(outputs.logps.device))

    def __call__(self, engine: Any, batch: Batch) -> Items:
        moved = batch.to(engine.world.device)
        if id(batch) not in self._said:
            return Items(-engine(moved).logps, moved.weights)
        _, ids, start = self._said[id(batch)]
        outputs = engine(moved, distribution=replace(self.asked, ids=ids.to(moved.targets.device).long()))
        return Items(-outputs.logps, moved.weights, {"kl": self._divergence(start, outputs.candidate_logps)})

    def _divergence(self, start: Tensor, now: Tensor) -> Tensor:
        """[K] sum of p (log p - log q) over the tokens known and the rest as one."""
        start = start.to(now.device)
        if self.likeliest < self.asked.vocabulary:
            start, now = truncated(start, rest="bucket"), truncated(now, rest="bucket")
        return (start.double().exp() * (start.double() - now.double())).sum(-1)
