"""Decoding many answers to many prompts with one transformers model: what is alike is read once.

Keys and values lie on three levels: what all prompts begin with, the rest of each prompt, and what each
answer has written so far. Every query sees the three through one softmax, so a prompt is read once for
all its answers and its cache is never repeated. Rows leave when they have ended.
Letters: N prompts, W answers to a prompt, B rows (answers being written), C tokens that all prompts share,
P tokens of the longest rest, L new queries of a row, H query heads, G key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from framework.errors import ModelError
from framework.rollout.base import Sampling
from framework.rollout.sampling import choose
from framework.rollout.sharing import Answer

IMPLEMENTATION = "sapwood_decoding"  # what transformers calls the attention below
KEYWORD = "decoding"  # the keyword that carries a `Sight` through the model
FOREIGN = ("position_bias", "indices", "block_indices", "sinks", "cache")  # attention that ours is not
NOWHERE = 1 << 30  # the position of padding: after every real token, so that none sees it

# Rows that have ended stay until this share of a batch is left: moving caches costs more than they do.
KEEP = 0.85
SCORES = 1 << 26  # attention scores held at once; longer prompts are read in several blocks of queries
ROOM = 32  # tokens that an answer's cache has room for at first; it doubles


class Read:
    """Keys and values of tokens read in one forward pass: of every attention call, in the order of calls.

    Kept where attention gets them, not where a model hands them to its cache: some models cache something
    smaller and make keys and values of it.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # each [N, G, P, D]
        self.values: list[Tensor] = []

    def keep(self, call: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what attention call number `call` got; returns all there is of it."""
        self.keys.append(keys.contiguous())
        self.values.append(values.contiguous())
        return self.keys[call], self.values[call]

    def select(self, rows: Tensor) -> None:
        """Keep these rows alone."""
        for store in (self.keys, self.values):
            store[:] = [tensor.index_select(0, rows) for tensor in store]


class Written(Read):
    """Keys and values of answers that grow by one token a forward pass."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most  # tokens that an answer may have
        self.length = 0

    def keep(self, call: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token [B, G, 1, D] behind the others."""
        return self._write(self.keys, call, keys), self._write(self.values, call, values)

    def _write(self, store: list[Tensor], call: int, new: Tensor) -> Tensor:
        rows, groups, _, width = new.shape
        room = store[call].shape[2] if call < len(store) else 0
        if self.length == room:
            wider = new.new_empty(rows, groups, min(max(ROOM, 2 * room), self.most), width)
            if room:
                wider[:, :, :room] = store[call]
            store[call : call + 1] = [wider]
        store[call][:, :, self.length] = new[:, :, 0]
        return store[call][:, :, : self.length + 1]


class _NoCache:
    """Stands where transformers expects a cache: attention does the keeping."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        """As far as a model asks: positions are always given."""
        return 0


@dataclass(frozen=True)
class Layout:
    """Where rows stand in a rectangle of N prompts by W answers."""

    prompts: int
    width: int  # W
    owner: Tensor  # [B] prompt of each row
    place: Tensor  # [B] place of each row
    row: Tensor | None  # [N * W] row at each place, any where there is none; None: all there, in order

    @classmethod
    def of(cls, owner: Tensor, prompts: int) -> Layout:
        """Rows of the same prompt stand together, prompts in order."""
        counts = torch.bincount(owner, minlength=prompts)
        width = int(counts.max())
        first = counts.cumsum(0) - counts
        rows = torch.arange(len(owner), device=owner.device)
        place = owner * width + rows - first[owner]
        if len(owner) == prompts * width:
            return cls(prompts, width, owner, place, None)
        row = torch.zeros(prompts * width, dtype=torch.int64, device=owner.device)
        row[place] = rows
        return cls(prompts, width, owner, place, row)

    def fold(self, rows: Tensor) -> Tensor:
        """[B, G, R, E] -> [N, G, W * R, E]: what belongs to one prompt becomes one matrix."""
        full = rows if self.row is None else rows.index_select(0, self.row)
        folded = full.unflatten(0, (self.prompts, self.width)).transpose(1, 2)
        return folded.flatten(2, 3)

    def unfold(self, folded: Tensor) -> Tensor:
        """[N, G, W * R, E] -> [B, G, R, E]."""
        full = folded.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)
        return full if self.row is None else full.index_select(0, self.place)


@dataclass
class Sight:
    """What the queries of one forward pass see, and where their own keys and values are kept."""

    own: Read
    queries: Tensor  # [B, L] positions of the queries
    keys: Tensor  # [B, C + P + own] positions of all keys, level by level
    prefix: Read | None
    prompts: Read | None = None
    layout: Layout | None = None
    calls: int = 0  # of attention so far
    _hidden: dict[int | None, Tensor | None] = field(default_factory=dict)

    def hidden(self, window: int | None) -> Tensor | None:
        """[B, 1, 1, L, keys], True where a query must not look; None where it may look everywhere."""
        if window not in self._hidden:
            ahead = self.keys[:, None] - self.queries[:, :, None]  # [B, L, keys]
            closed = ahead > 0
            if window is not None:
                closed |= ahead <= -window
            self._hidden[window] = closed[:, None, None] if bool(closed.any()) else None
        return self._hidden[window]


@dataclass(frozen=True)
class _Rules:
    """What one layer asks for, besides causality."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # [H] a logit of each head that takes weight and gives no value


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, G, own, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    decoding: Sight | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[B, L, H, D] and no weights, in the form that transformers calls."""
    strange = [name for name in FOREIGN if others.get(name) is not None]
    if decoding is None or attention_mask is not None or strange:
        raise ModelError(
            f"{type(module).__name__} cannot be rolled out in this process: its attention is not told what "
            "the rows of a batch share, or asks for more than keys and values. Use rollout=vllm"
        )
    rules = _Rules(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    call = decoding.calls
    decoding.calls += 1
    key, value = decoding.own.keep(call, key, value)
    hidden = decoding.hidden(sliding_window)
    rows, heads, length, _ = query.shape
    block = max(1, SCORES // (rows * heads * decoding.keys.shape[1]))
    parts = []
    for start in range(0, length, block):
        seen = None if hidden is None else hidden[:, :, :, start : start + block]
        parts.append(_attend(query[:, :, start : start + block], key, value, call, decoding, seen, rules))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, call: int, sight: Sight, hidden: Tensor | None, rules: _Rules
) -> Tensor:
    """One softmax over the levels: each is one product for scores and one for values."""
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    q = query.reshape(rows, groups, -1, width)  # [B, G, H / G * L, D]
    scores = torch.empty(*q.shape[:3], sight.keys.shape[1], dtype=torch.float32, device=q.device)
    start = 0
    if sight.prefix is not None:
        shared = sight.prefix.keys[call][0]  # [G, C, D]
        flat = q.transpose(0, 1).flatten(1, 2)  # [G, B * H / G * L, D]
        start = shared.shape[1]
        scores[..., :start] = (flat @ shared.transpose(1, 2)).unflatten(1, (rows, -1)).transpose(0, 1)
    if sight.prompts is not None and sight.layout is not None:
        asked = sight.prompts.keys[call]  # [N, G, P, D]
        products = sight.layout.fold(q) @ asked.transpose(2, 3)
        scores[..., start : start + asked.shape[2]] = sight.layout.unfold(products)
        start += asked.shape[2]
    scores[..., start:] = q @ key.transpose(2, 3)
    weights = _softmax(scores.mul_(rules.scale), heads, length, hidden, rules).to(value.dtype)
    out = weights[..., start:] @ value
    if sight.prompts is not None and sight.layout is not None:
        said = sight.prompts.values[call]
        part = sight.layout.fold(weights[..., start - said.shape[2] : start])
        out += sight.layout.unfold(part @ said)
    if sight.prefix is not None:
        said = sight.prefix.values[call][0]
        part = weights[..., : said.shape[1]].transpose(0, 1).flatten(1, 2)
        out += (part @ said).unflatten(1, (rows, -1)).transpose(0, 1)
    return out.reshape(rows, heads, length, -1).transpose(1, 2)


def _softmax(scores: Tensor, heads: int, length: int, hidden: Tensor | None, rules: _Rules) -> Tensor:
    """Weights of fp32 `scores` [B, G, H / G * L, keys], changed in place on the way."""
    if rules.softcap is not None:
        scores.div_(rules.softcap).tanh_().mul_(rules.softcap)
    if hidden is not None:
        scores.unflatten(2, (-1, length)).masked_fill_(hidden, -torch.inf)
    if rules.sinks is None:
        return scores.softmax(-1)
    by_head = rules.sinks.float().view(1, scores.shape[1], -1, 1, 1)
    sinks = by_head.expand(len(scores), -1, -1, length, 1).reshape(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]


def prepare(lm: Any) -> str:
    """Let `lm` attend as decoding needs it; returns the implementation that it had."""
    before: str = lm.config._attn_implementation
    AttentionInterface.register(IMPLEMENTATION, _attention)
    lm.set_attn_implementation(IMPLEMENTATION)
    return before


class Decoder:
    """One model that was prepared, and what all prompts of a call begin with: never outlives the weights."""

    def __init__(self, lm: Any, ends: Sequence[int], sampling: Sampling, shared: Sequence[int]) -> None:
        self.lm, self.sampling = lm, sampling
        self.ends = torch.tensor(sorted(ends), device=lm.device)
        self.prefix: Read | None = None
        if shared:
            ids = torch.tensor([list(shared)], device=lm.device)
            places = torch.arange(len(shared), device=lm.device)[None]
            self.prefix = Read()
            self._forward(ids, Sight(self.prefix, places, places, None))
        self.shared = len(shared)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        uniform: Tensor,
        on_end: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """Answers to `prompts`, all those of the first prompt first.

        `prompts` are whole, each longer than what is shared; `uniform` [N * W, max_new_tokens] holds the
        numbers that each answer is drawn with, as many answers to each prompt.
        """
        device = self.lm.device
        read, keys, logits = self._read(prompts)
        width = len(uniform) // len(prompts)
        owner = torch.arange(len(prompts), device=device).repeat_interleave(width)
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        layout = Layout.of(owner, len(prompts))
        written = Written(self.sampling.max_new_tokens)
        uniform = uniform.to(device)
        alive = torch.arange(len(owner), device=device)  # [B] which answer each row is
        ended = torch.zeros(len(owner), dtype=torch.bool, device=device)  # [B]
        ids = torch.zeros(len(owner), self.sampling.max_new_tokens, dtype=torch.int64, device=device)
        logps = torch.zeros(ids.shape, device=device)
        counts = torch.full((len(owner),), self.sampling.max_new_tokens, device=device)
        logits = logits.repeat_interleave(width, 0)
        for step in range(self.sampling.max_new_tokens):
            tokens, nats = choose(logits, uniform[alive, step], self.sampling)
            ids[alive, step], logps[alive, step] = tokens, nats
            now = torch.isin(tokens, self.ends) & ~ended
            counts[alive[now]] = step + 1
            ended |= now
            for _ in range(int(now.sum())):
                on_end()
            left = len(ended) - int(ended.sum())
            if left == 0 or step + 1 == self.sampling.max_new_tokens:
                break
            if left <= KEEP * len(ended):
                keep = (~ended).nonzero()[:, 0]
                alive, tokens, ended = alive[keep], tokens[keep], ended[keep]
                written.select(keep)
                remaining, owner = owner[keep].unique_consecutive(return_inverse=True)
                if len(remaining) < layout.prompts:
                    read.select(remaining)
                    keys, lengths = keys[remaining], lengths[remaining]
                layout = Layout.of(owner, len(remaining))
            logits = self._next(tokens, lengths, keys, read, layout, written)
        for _ in range(len(ended) - int(ended.sum())):
            on_end()
        return self._answers(ids, logps, counts)

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[Read, Tensor, Tensor]:
        """Keys and values of the prompts' own parts, their positions [N, P], and logits [N, V] after them."""
        own = [list(ids[self.shared :]) for ids in prompts]
        longest = max(len(ids) for ids in own)
        padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in own], device=self.lm.device)
        places = torch.tensor(
            [
                [NOWHERE] * (longest - len(ids)) + list(range(self.shared, self.shared + len(ids)))
                for ids in own
            ],
            device=self.lm.device,
        )
        read = Read()
        keys = torch.cat([self._shared_places(len(own)), places], dim=1)
        logits = self._forward(padded, Sight(read, places, keys, self.prefix))
        return read, places, logits

    def _next(
        self, tokens: Tensor, lengths: Tensor, keys: Tensor, read: Read, layout: Layout, written: Written
    ) -> Tensor:
        """Logits [B, V] after one more token of each row."""
        start = lengths[layout.owner][:, None]  # [B, 1] where each answer begins
        own = start + torch.arange(written.length + 1, device=start.device)
        seen = torch.cat([self._shared_places(len(tokens)), keys[layout.owner], own], dim=1)
        sight = Sight(written, start + written.length, seen, self.prefix, read, layout)
        logits = self._forward(tokens[:, None], sight)
        written.length += 1
        return logits

    def _forward(self, ids: Tensor, sight: Sight) -> Tensor:
        places = sight.queries.where(sight.queries < NOWHERE, 0)
        # By index: the slice that a number would mean is not contiguous, and its product with the head copies
        # the head once for every row.
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        out = self.lm(
            input_ids=ids,
            position_ids=places,
            past_key_values=_NoCache(),
            use_cache=True,
            logits_to_keep=last,
            **{KEYWORD: sight},
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _shared_places(self, rows: int) -> Tensor:
        return torch.arange(self.shared, device=self.lm.device).expand(rows, -1)

    def _answers(self, ids: Tensor, logps: Tensor, counts: Tensor) -> list[Answer]:
        ends = set(self.ends.tolist())
        return [
            Answer(written[:count], nats[:count], written[count - 1] in ends)
            for written, nats, count in zip(ids.tolist(), logps.tolist(), counts.tolist(), strict=True)
        ]
