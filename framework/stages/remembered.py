"""Replay that follows the start model: KL(start || model) at every replayed token instead of the text's loss.

The start model is asked once, before training, and its likeliest tokens lie on disk (`columns`), found again
by what a segment says; so no second model is in memory, and the data may come in any order and cut. Letters:
K trained positions, k tokens known at each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.batch import Batch, Distribution
from framework.losses.distill import forward_kl, truncated
from framework.losses.items import Items
from framework.stages import columns, segments
from framework.stages.sft import by_source
from framework.strategy.base import Engine


@dataclass(frozen=True)
class Said:
    """What the start model says of a batch."""

    known: Tensor  # [K] bool, where it was asked
    ids: Tensor  # [K, k] int64, its likeliest tokens; anything where it was not asked
    logps: Tensor  # [K, k] fp32 nats


class Memory:
    """The start model's answers to the rows of some sources; `asked` says how many tokens of how many.

    `sources` are their numbers in batches; None: all rows are theirs.
    """

    def __init__(self, found: columns.Columns, asked: Distribution, sources: Collection[int] | None) -> None:
        assert asked.likeliest is not None
        self.columns, self.asked, self.sources = found, asked, sources
        self.width = asked.likeliest

    def __call__(self, batch: Batch) -> Said:
        """On the CPU. Raises CheckpointError for a segment that was not there when the model was asked."""
        told = [
            int(source) >= 0 and (self.sources is None or int(source) in self.sources)
            for source in batch.sources.tolist()
        ]
        counts = segments.tokens(batch).tolist()
        values = torch.zeros(len(batch.trained), 2 * self.width)
        known = torch.zeros(len(batch.trained), dtype=torch.bool)
        rows = segments.order(batch).cpu().split(counts)
        if any(told):
            for key, mine, places in zip(columns.keys(batch), told, rows, strict=True):
                if mine:
                    values[places] = torch.from_numpy(self.columns.find(key).copy()).view(-1, 2 * self.width)
                    known[places] = True
        ids, logps = values.split(self.width, dim=1)
        return Said(known, ids.long(), logps)


def remember(
    root: Path,
    identity: Mapping[str, Any],
    micros: Iterable[Batch],
    engine: Engine,
    asked: Distribution,
    sources: Collection[int] | None,
) -> Memory:
    """The answers under `root` that belong to `identity`, asked of `engine` over `micros` where absent.

    `engine` holds the start weights; `micros` hold every row that will be replayed once over all ranks, as
    many on each. Collective. Raises CheckpointError when they cannot be written or are not seen by all ranks.
    """
    directory = Path(root).expanduser() / columns.fingerprint({**identity, "likeliest": asked.likeliest})
    if not columns.whole(directory, world=engine.world):
        columns.write(directory, _answers(engine, micros, asked), world=engine.world)
    return Memory(columns.Columns(directory), asked, sources)


def _answers(engine: Engine, micros: Iterable[Batch], asked: Distribution) -> Iterator[tuple[Batch, Tensor]]:
    with engine.inference():
        for batch in micros:
            outputs = engine(batch, distribution=asked)
            # numbers of tokens are below 2^24, so fp32 holds them exactly
            yield batch, torch.cat([outputs.candidate_ids.float(), outputs.candidate_logps.float()], dim=1)


class TowardsStart:
    """An objective per trained token: KL(start || model) where `memory` knows the start model's answer, else
    `loss` of the text, a pure function of `logps` [K] and `weight` [K]; `sources` as in `stages.sft`.

    Both have one denominator, the trained tokens, so a share of replay means what it means without. The
    metric `kl` is that divergence, over the replayed tokens alone.
    """

    def __init__(self, loss: Callable[..., Items], memory: Memory, sources: Sequence[str] = ()) -> None:
        self.loss, self.memory, self.sources = loss, memory, sources
        self.asked = replace(memory.asked, likeliest=None)

    def __call__(self, engine: Engine, batch: Batch) -> Items:
        device = engine.world.device
        said, batch = self.memory(batch), batch.to(device)
        ids, start, known = said.ids.to(device), said.logps.to(device), said.known.to(device)
        outputs = engine(batch, distribution=replace(self.asked, ids=ids))
        now = outputs.candidate_logps
        if self.memory.width < self.asked.vocabulary:
            start, now = truncated(start, rest="bucket"), truncated(now, rest="bucket")
        divergence = forward_kl(now, start, batch.weights * known).loss
        own = self.loss(logps=outputs.logps, weight=batch.weights)
        loss = torch.where(known, divergence, own.loss)
        kl = divergence.detach().masked_fill(~known, torch.nan)
        metrics = {name: value.masked_fill(known, torch.nan) for name, value in own.metrics.items()}
        return by_source(Items(loss, own.weight, {**metrics, "kl": kl}), batch, self.sources)
