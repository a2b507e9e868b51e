"""A tiny transformer, uneven and partly masked data, and one way to train it on any engine.

Sizes are odd on purpose: 13 tokens, 10 channels and 14 inner ones divide evenly by almost no number
of ranks, so shards are uneven and some are empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework.strategy.base import FIRST, MASTER, SECOND
from framework.strategy.ddp import Ddp
from framework.strategy.fsdp2 import Fsdp

VOCABULARY, HIDDEN, INNER, BLOCKS = 13, 10, 14, 3
BETA = 0.9
STRATEGIES = {
    "ddp": Ddp,
    "fsdp": Fsdp,
    "hsdp": partial(Fsdp, shards=2),
    "fsdp_offload": partial(Fsdp, offload=True),
}


@dataclass(frozen=True)
class Tokens:
    """One micro-batch: right-padded rows [R, T] and the weight of each next-token loss."""

    tokens: Tensor  # [R, T + 1]
    weights: Tensor  # [R, T]

    def to(self, device):
        return replace(self, tokens=self.tokens.to(device), weights=self.weights.to(device))


class Answer(NamedTuple):
    losses: Tensor  # [R, T] fp32


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)
        self.low = nn.Linear(HIDDEN, 1, bias=False)  # an adapter: one row, so most ranks own none of it
        self.high = nn.Linear(1, HIDDEN, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, *, causal=True):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.dropout(F.scaled_dot_product_attention(q, k, v, is_causal=causal))
        return x + self.dropout(self.down(F.silu(self.up(x)))) + self.high(self.low(x))


class Toy(nn.Module):
    """Embedding tied to the head; a real buffer; `frozen` trains the adapters alone."""

    def __init__(self, dropout=0.0, frozen=False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer(
            "positions", torch.sin(torch.arange(64.0)[:, None] * torch.arange(1, HIDDEN + 1))
        )
        if frozen:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(".low." in name or ".high." in name)

    def blocks(self):
        return list(self.layers)

    def forward(self, batch):
        tokens = batch.tokens
        x = self.embed(tokens[:, :-1])
        x = x + self.positions[: x.shape[1]].to(x.dtype)
        for block in self.layers:
            x = block(x, causal=True)
        logits = self.head(self.norm(x)).float()
        return Answer(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"))


def source():
    """(name, value) pairs as a reader would give them: values that bf16 cannot hold exactly."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in Toy().named_parameters():
        value = torch.randn(parameter.shape, generator=generator) * 0.3
        yield name, value + 1.0 if name.endswith("norm.weight") else value


def adamw(named):
    groups = {True: [], False: []}
    for name, parameter in named:
        groups[parameter.ndim >= 2 and "embed" not in name].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": 0.1 if decays else 0.0, "lr_scale": 1.0}
            for decays, parameters in groups.items()
            if parameters
        ],
        lr=0.0,
        betas=(BETA, 0.99),
        eps=1e-8,
    )


def examples(step):
    """Seven rows of 3 to 20 tokens; about half of each is trained, and of the second nothing."""
    generator = torch.Generator().manual_seed(100 + step)
    rows = []
    for number in range(7):
        length = int(torch.randint(3, 21, (), generator=generator))
        tokens = torch.randint(0, VOCABULARY, (length + 1,), generator=generator)
        weights = (torch.rand(length, generator=generator) < 0.5).float() * (number != 1)
        rows.append((tokens, weights))
    return rows


def micros(step, rank, size, count) -> list[Tokens]:
    """The share of `rank`: `count` micro-batches, some of which are a single row that weighs nothing."""
    mine = examples(step)[rank::size]
    fill = (torch.zeros(3, dtype=torch.long), torch.zeros(2))
    return [pad(mine[micro::count] or [fill]) for micro in range(count)]


def pad(rows: Sequence[tuple[Tensor, Tensor]]) -> Tokens:
    longest = max(len(weights) for _, weights in rows)
    return Tokens(
        torch.stack([F.pad(tokens, (0, longest + 1 - len(tokens))) for tokens, _ in rows]),
        torch.stack([F.pad(weights, (0, longest - len(weights))) for _, weights in rows]),
    )


def total(answer, batch):
    return (answer.losses * batch.weights.flatten()).sum()


def units(step):
    return sum(float(weights.sum()) for _, weights in examples(step))


def start(world, name, *, dropout=0.0, frozen=False, **options):
    """An engine over the toy. Only rank 0 may read the source."""

    def weights():
        assert world.rank == 0
        return source()

    return STRATEGIES[name](world, **options).train(lambda: Toy(dropout, frozen), weights, adamw)


def advance(engine, steps, *, count, lr=0.01, max_grad_norm=1.0, poison=None):
    """Train on `steps`; [(loss, norm)], losses of the global batch. `poison` rank's loss becomes NaN."""
    world, history = engine.world, []
    for step in steps:
        loss_here = 0.0
        shares = micros(step, world.rank, world.size, count)
        for number, batch in enumerate(shares):
            torch.manual_seed(1000 * step + 10 * world.rank + number)
            with engine.micro(last=number == count - 1):
                loss = total(engine(batch), batch) / units(step)
                engine.backward(loss * float("nan") if poison == world.rank else loss)
            loss_here += loss.item()
        norm = engine.step(lr=lr, max_grad_norm=max_grad_norm)
        history.append((world.sum([loss_here])[0], norm))
    return history


def plain(steps, *, frozen=False, lr=0.01, max_grad_norm=1.0):
    """The reference: one process, torch alone, all rows in one batch. History and final state."""
    model = Toy(frozen=frozen)
    model.load_state_dict(dict(source()), strict=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(trained.items())
    history = []
    for step in steps:
        batch = pad(examples(step))
        loss = total(model(batch), batch) / units(step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    state = {
        name: {
            MASTER: p.detach().flatten().numpy(),
            FIRST: optimizer.state[p]["exp_avg"].flatten().numpy(),
            SECOND: optimizer.state[p]["exp_avg_sq"].flatten().numpy(),
        }
        for name, p in trained.items()
    }
    return history, state


def portable(state):
    """An EngineState as plain arrays of their own, to be sent between processes and kept."""
    return state.updates, {
        name: [(s.shape, s.start, {which: v.numpy().copy() for which, v in s.values.items()}) for s in shards]
        for name, shards in state.shards.items()
    }


def same(one, other):
    """Are two portable states of one rank equal to the bit?"""
    return one[0] == other[0] and all(
        np.array_equal(left[2][which], right[2][which])
        for name in one[1]
        for left, right in zip(one[1][name], other[1][name], strict=True)
        for which in (MASTER, FIRST, SECOND)
    )


def exchanged(world, state):
    """`whole` of all ranks' states, inside a worker: what a checkpoint on a shared disk would hold."""
    updates, shards = portable(state)
    lists = {n: [(s, b, {w: v.tolist() for w, v in p.items()}) for s, b, p in ss] for n, ss in shards.items()}
    return whole(
        (
            updates,
            {
                n: [(s, b, {w: np.float32(v) for w, v in p.items()}) for s, b, p in ss]
                for n, ss in one.items()
            },
        )
        for one in world.gather(lists)
    )


def whole(states):
    """All ranks' portable states -> (updates, {name: {which: [n]}}); each element owned exactly once."""
    states = list(states)
    updates = {updates for updates, _ in states}
    assert len(updates) == 1
    joined = {}
    for name in states[0][1]:
        shards = [shard for _, state in states for shard in state[name]]
        size = int(np.prod(shards[0][0]))
        owners = np.zeros(size, int)
        values = {which: np.full(size, np.nan, np.float32) for which in (MASTER, FIRST, SECOND)}
        for _, begin, pieces in shards:
            for which, piece in pieces.items():
                assert piece.dtype == np.float32
                values[which][begin : begin + len(piece)] = piece
            owners[begin : begin + len(piece)] += 1
        assert (owners == 1).all(), name
        joined[name] = values
    return updates.pop(), joined


def reader(joined):
    """A `Read` over what `whole` returned."""
    return lambda name, which, begin, end: torch.from_numpy(joined[name][which][begin:end].copy())
