"""Pairs and labelled answers as batches, made by hand, and an engine that answers fixed numbers."""

import contextlib
from types import SimpleNamespace

import torch

from framework.batch import LabelledBatch, Outputs, PairBatch


class One:
    """A world of one."""

    rank, size, local_rank, device = 0, 1, 0, torch.device("cpu")

    def sum(self, values):
        return [float(value) for value in values]

    max = sum

    def gather(self, value):
        return [value]

    def broadcast(self, value):
        return value


class Fixed:
    """An engine whose token log-probabilities are a function of the batch; remembers what it was asked."""

    def __init__(self, logps, **more):
        self.world, self.trained = One(), {}
        self.logps, self.more = logps, more
        self.asked = []

    @contextlib.contextmanager
    def inference(self):
        with torch.no_grad():
            yield

    def __call__(self, batch, **options):
        self.asked.append(options)
        fields = {name: get(batch) for name, get in self.more.items() if name in options.get("needs", ())}
        return Outputs(self.logps(batch), **fields)


def layout(segments, *, packed=True, source=0):
    """Fields of a batch from [(prompt ids, answer ids)]: the answers' tokens are trained."""
    rows = [[*prompt, *answer] for prompt, answer in segments]
    lengths = [len(row) for row in rows]
    begins = [sum(lengths[:s]) for s in range(len(rows))]
    longest = max(lengths)
    if packed:
        ids = torch.tensor([[token for row in rows for token in row]])
        positions = torch.tensor([[t for n in lengths for t in range(n)]])
        flat = begins
    else:
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        positions = torch.arange(longest).expand(len(rows), -1).contiguous()
        flat = [s * longest for s in range(len(rows))]
    trained = [
        (flat[s] + t, rows[s][t + 1], s)
        for s, (prompt, _) in enumerate(segments)
        for t in range(len(prompt) - 1, lengths[s] - 1)
    ]
    return dict(
        input_ids=ids,
        position_ids=positions,
        boundaries=torch.tensor([*begins, sum(lengths)], dtype=torch.int32),
        trained=torch.tensor([place for place, _, _ in trained]),
        targets=torch.tensor([target for _, target, _ in trained]),
        weights=torch.ones(len(trained)),
        segments=torch.tensor([s for _, _, s in trained]),
        sources=torch.full((len(rows),), source),
        packed=packed,
        max_length=longest,
    )


def last_only(fields):
    """The same, with the last token of each segment alone as a trained position: for reward models."""
    ends = fields["boundaries"][1:].long() - 1
    count = len(ends)
    return fields | dict(
        trained=ends,
        targets=torch.zeros(count, dtype=torch.int64),
        weights=torch.ones(count),
        segments=torch.arange(count),
    )


def pairs(rows, *, weights=None, margins=None, packed=True, scored=False):
    """A PairBatch of [(prompt, chosen, rejected)]; an empty list gives a fill."""
    fill = not rows
    rows = rows or [([1], [1], [1])]
    fields = layout(
        [side for prompt, chosen, rejected in rows for side in ((prompt, chosen), (prompt, rejected))],
        packed=packed,
        source=-1 if fill else 0,
    )
    weights = [0.0] if fill else weights or [1.0] * len(rows)
    return PairBatch(
        **(last_only(fields) if scored else fields),
        pair_weights=torch.tensor(weights),
        margins=torch.tensor(margins or [0.0] * len(rows)),
        units=0.0 if fill else float(len(rows)),
    )


def labelled(rows, *, packed=True):
    """A LabelledBatch of [(prompt, answer, liked)]; an empty list gives a fill."""
    fill = not rows
    rows = rows or [([1], [1], True)]
    return LabelledBatch(
        **layout([(prompt, answer) for prompt, answer, _ in rows], packed=packed, source=-1 if fill else 0),
        desirable=torch.tensor([liked for _, _, liked in rows]),
        segment_weights=torch.full((len(rows),), 0.0 if fill else 1.0),
        units=0.0 if fill else float(len(rows)),
    )


def share(rows, rank, size, make, *, at_once=2):
    """This rank's micro-batches of a step's rows, at most `at_once` rows each, as many on every rank."""
    dealt = [rows[r::size] for r in range(size)]
    count = max(-(-len(mine) // at_once) for mine in dealt)
    return [make(dealt[rank][at_once * m : at_once * (m + 1)]) for m in range(count)]


class Steps:
    """A loader over a list of steps, each a tuple of rows, of which this rank takes its share."""

    def __init__(self, steps, make, world=None, *, mismatch=None, at_once=2):
        self.steps, self.make, self.world = steps, make, world or One()
        self.mismatch, self.at_once, self.index = mismatch, at_once, 0

    def next(self):
        rows = self.steps[self.index % len(self.steps)]
        self.index += 1
        there = self.world.rank, self.world.size
        others = self.mismatch(rows) if self.mismatch else []
        return SimpleNamespace(
            micros=share(rows, *there, self.make, at_once=self.at_once),
            mismatched=share(others, *there, self.make, at_once=self.at_once) if others else [],
            stats={"pairs": float(len(rows))},
        )

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]


def rotated(rows):
    """Every prompt with the answer of the row before it."""
    return [
        (prompt, answer, liked)
        for (prompt, _, liked), (_, answer, _) in zip(rows, [rows[-1], *rows[:-1]], strict=True)
    ]
