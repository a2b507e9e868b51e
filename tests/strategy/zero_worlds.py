"""What test_zero*.py share: a tiny model, uneven masked data, one-process references, worker functions.

The model has what strategies stumble over: odd sizes, tied embeddings, biases, an fp32 buffer, adapters
beside frozen weights, and a head that is used in chunks, as a matrix, outside its own module.
"""

import dataclasses
import functools
import gc
import os

import torch
from torch import nn

from framework.batch import Batch, Outputs
from framework.losses.logprobs import token_logps

VOCABULARY, WIDTH = 13, 6


class Block(nn.Module):
    def __init__(self, adapter: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH + 1)
        self.down = nn.Linear(2 * WIDTH + 1, WIDTH, bias=False)
        if adapter:
            self.lora_a = nn.Linear(WIDTH, 2, bias=False)
            self.lora_b = nn.Linear(2, 2 * WIDTH + 1, bias=False)

    def forward(self, hidden):
        normed = self.norm(hidden)
        inner = self.up(normed)
        if hasattr(self, "lora_a"):
            inner = inner + self.lora_b(self.lora_a(normed))
        return hidden + self.down(nn.functional.silu(inner))


class Tiny(nn.Module):
    def __init__(self, adapter: bool = False, tied: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(adapter) for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("phase", torch.linspace(0.1, 1.3, WIDTH), persistent=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        if adapter:
            for name, parameter in self.named_parameters():
                parameter.requires_grad = "lora" in name

    def blocks(self):
        return list(self.layers)

    def forward(self, batch):
        assert self.phase.dtype == torch.float32
        hidden = self.embed(batch.input_ids)
        hidden = hidden + (batch.position_ids[..., None] * self.phase).sin().to(hidden.dtype)
        hidden = self.dropout(hidden)
        for block in self.layers:
            hidden = hidden + nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]  # the position before
            hidden = block(hidden)
        hidden = hidden.flatten(0, 1)[batch.trained]
        logps, *_ = token_logps(hidden, self.lm_head.weight, batch.targets, chunk=3)
        return Outputs(logps)


def tiny(seed: int = 0, **options) -> Tiny:
    """The reference: real fp32 weights, the same everywhere, none of them exact in bf16."""
    model = Tiny(**options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


@functools.cache
def settle() -> None:
    """Once per process: DeepSpeed collects garbage for every engine, and most of that is walking modules."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401

    gc.freeze()


def values_of(model):
    """A `Weights` over a reference model."""
    return lambda: ((name, parameter.detach()) for name, parameter in model.named_parameters())


def start(strategy, seed: int = 0, **options):
    """An engine of that strategy over `tiny`."""
    settle()
    return strategy.train(lambda: Tiny(**options), values_of(tiny(seed, **options)), adamw)


def weights_of(engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.weights()}


class Pair(nn.Module):
    """y = a x, and + b x where the batch says so; `start` gives an engine of a = b = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

    def blocks(self):
        return []

    def forward(self, x):
        return self.a(x) + self.b(x) if x.numel() == 2 else self.a(x)

    @classmethod
    def start(cls, strategy):
        return strategy.train(
            cls, lambda: ((name, torch.ones(1, 1)) for name in ("a.weight", "b.weight")), adamw
        )


def adamw(named, decay=0.1):
    """Smooth in the gradient (a large eps), so that one update compares gradients as SGD would."""
    matrices, vectors = [], []
    for name, parameter in named:
        (matrices if parameter.ndim > 1 and "embed" not in name else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": decay, "lr_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 0.5},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, eps=1.0)


def batch(length: int, seed: int, masked: bool = False) -> Batch:
    """One packed row of one segment, every third position untrained; `masked` makes all weights 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (1, length + 1), generator=generator)
    trained = torch.tensor([position for position in range(length) if position % 3 != 2])
    weights = torch.rand(len(trained), generator=generator) + 0.5
    if masked:
        weights = torch.zeros_like(weights)
    return Batch(
        input_ids=ids[:, :-1],
        position_ids=torch.arange(length)[None],
        boundaries=torch.tensor([0, length], dtype=torch.int32),
        trained=trained,
        targets=ids[0, 1:][trained],
        weights=weights,
        segments=torch.zeros_like(trained),
        sources=torch.zeros(1, dtype=torch.int64),
        packed=True,
        max_length=length,
        units=float(weights.sum()),
    )


def cut(ranks: int, micros: int, step: int = 0) -> list[list[Batch]]:
    """The same examples of one optimizer step for every cut, as [rank][micro].

    Twelve examples of 3 to 19 tokens. Each (rank, micro) place joins its share into one padded batch,
    so places differ in size and the head runs in different numbers of chunks. With more than two
    places one of them is a fill: nothing in it counts.
    """
    lengths = [3, 19, 5, 4, 11, 7, 3, 8, 16, 4, 6, 9]
    examples = [batch(length, 100 * step + number) for number, length in enumerate(lengths)]
    places = ranks * micros
    filled = places - (places > 2)
    shares = [examples[place::filled] for place in range(filled)]
    joined = [join(share) for share in shares] + [batch(4, 999, masked=True)] * (places - filled)
    return [joined[rank::ranks] for rank in range(ranks)]


def join(examples: list[Batch]) -> Batch:
    """Examples as the rows of one padded batch."""
    longest = max(example.max_length for example in examples)

    def rows(tensors):
        return torch.cat([nn.functional.pad(t, (0, longest - t.shape[1])) for t in tensors])

    return dataclasses.replace(
        examples[0],
        input_ids=rows([e.input_ids for e in examples]),
        position_ids=rows([e.position_ids for e in examples]),
        trained=torch.cat([e.trained + row * longest for row, e in enumerate(examples)]),
        targets=torch.cat([e.targets for e in examples]),
        weights=torch.cat([e.weights for e in examples]),
        packed=False,
        max_length=longest,
        units=sum(e.units for e in examples),
    )


def loss_of(outputs, micro, units):
    return -(outputs.logps * micro.weights).sum() / units


def units_of(plan) -> float:
    return sum(micro.units for share in plan for micro in share)


def train_one_process(model, plans, *, lr, clip, optimizer=None):
    """Plain torch over the same examples: (norms before clipping, losses, gradients of the last step)."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer or adamw(trained.items())
    norms, losses = [], []
    for plan in plans:
        optimizer.zero_grad()
        losses.append(0.0)
        for micro in (micro for share in plan for micro in share):
            loss = loss_of(model(micro), micro, units_of(plan))
            loss.backward()
            losses[-1] += float(loss.detach())
        norms.append(float(nn.utils.clip_grad_norm_(trained.values(), clip or float("inf"))))
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()
    return norms, losses, gradients


def train(engine, plans, *, lr, clip):
    """The same through an engine: (norms, losses over all ranks)."""
    norms, losses = [], []
    for plan in plans:
        share = plan[engine.world.rank]
        mine = 0.0
        for number, micro in enumerate(share):
            with engine.micro(last=number == len(share) - 1):
                loss = loss_of(engine(micro), micro, units_of(plan))
                engine.backward(loss)
            mine += float(loss.detach())
        losses.append(engine.world.sum([mine])[0])
        norms.append(engine.step(lr=lr, max_grad_norm=clip))
    return norms, losses


def whole(states, which) -> dict[str, torch.Tensor]:
    """All ranks' shards put together; asserts that every element has exactly one owner."""
    result = {}
    for name in states[0].shards:
        pieces = [shard for state in states for shard in state.shards[name]]
        shape = pieces[0].shape
        flat = torch.full((functools.reduce(int.__mul__, shape, 1),), float("nan"))
        for piece in pieces:
            place = flat[piece.start : piece.start + piece.values[which].numel()]
            assert place.isnan().all(), f"{name}: two ranks own an element"
            place.copy_(piece.values[which])
        assert not flat.isnan().any(), f"{name}: nobody owns an element"
        result[name] = flat.view(shape)
    return result


def reader(states):
    """A `Read` over the states of all ranks."""
    found = {which: whole(states, which) for which in ("master", "exp_avg", "exp_avg_sq")}
    return lambda name, which, start, stop: found[which][name].flatten()[start:stop]


def equal(left, right) -> bool:
    """Bitwise equality of two mappings of tensors."""
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)
