"""Drawing tokens: from logits and one uniform number a row to a token and its log-probability.

Knows no model. A row's draw is the inverse of its own distribution function at its own number, so it
depends on no neighbour, and the log-probability kept is that of the very law it was drawn from.
Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.keyed import key
from framework.rollout.base import Sampling

BLOCK = 256  # the distribution function is summed by blocks first: one pass over V instead of three
PART = 1 << 23  # entries of [B, V] worked on at once
CANDIDATES = 256  # how many of the likeliest tokens are sorted first to find where `top_p` is reached


def uniforms(sampling: Sampling, prompt: int, sample: int) -> Tensor:
    """[max_new_tokens] fp64 in [0, 1): all that chance does to answer `sample` of prompt `prompt`."""
    generator = torch.Generator().manual_seed(key(sampling.seed, "answer", prompt, sample))
    return torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=generator)


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(tokens [B] int64, their log-probabilities [B] fp32 in nats) from logits [B, V], uniform [B] fp64.

    The law: softmax(logits / temperature); of that the `top_k` likeliest (0: all) and everything as
    likely as the last of them; of that the fewest that hold `top_p` of what is left, ties again kept.
    Temperature 0 takes the likeliest token and keeps its log-probability at temperature 1.
    """
    parts = max(1, PART // logits.shape[1])
    drawn = [
        _draw(part, numbers, sampling)
        for part, numbers in zip(logits.split(parts), uniform.split(parts), strict=True)
    ]
    tokens, logps = zip(*drawn, strict=True)
    return torch.cat(tokens), torch.cat(logps)


def _draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    greedy = sampling.temperature == 0
    scaled = logits.float() / (1.0 if greedy else sampling.temperature)
    if gap := -scaled.shape[1] % BLOCK:
        scaled = F.pad(scaled, (0, gap), value=-torch.inf)
    tops = scaled.view(len(scaled), -1, BLOCK).amax(2)  # [B, blocks]
    highest = tops.amax(1, keepdim=True)  # [B, 1]
    weights = (scaled - highest).exp_()  # [B, V], the likeliest token has 1
    if not greedy:
        _filter(weights, sampling)
    blocks = weights.view(len(weights), -1, BLOCK)
    sums = blocks.sum(2).double()
    if greedy:
        block = tops.argmax(1)
        tokens = block * BLOCK + _block(scaled.view_as(blocks), block).argmax(1)
    else:
        running = sums.cumsum(1)
        block = _first_above(running, uniform * running[:, -1])
        inside = _block(blocks, block).double().cumsum(1)
        before = running.gather(1, block[:, None])[:, 0] - sums.gather(1, block[:, None])[:, 0]
        share = (uniform * running[:, -1] - before) / sums.gather(1, block[:, None])[:, 0]
        tokens = block * BLOCK + _first_above(inside, share * inside[:, -1])
    chosen = scaled.gather(1, tokens[:, None]) - highest
    return tokens, (chosen[:, 0].double() - sums.sum(1).log()).float()


def _block(blocks: Tensor, index: Tensor) -> Tensor:
    """One block of each row: [B, BLOCK]."""
    return blocks.gather(1, index[:, None, None].expand(-1, 1, BLOCK))[:, 0]


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """[B] the first place whose running sum exceeds `target`: never one that adds nothing."""
    last = running[:, -1]
    below = torch.nextafter(last, torch.zeros_like(last))  # rounding may have brought the target to the end
    return torch.searchsorted(running, torch.minimum(target, below)[:, None], right=True)[:, 0]


def _filter(weights: Tensor, sampling: Sampling) -> None:
    """Sets to 0, in place, what top_k and top_p leave out of `weights` [B, V]."""
    if 0 < sampling.top_k < weights.shape[1]:
        least = weights.topk(sampling.top_k).values[:, -1:]
        weights.masked_fill_(weights < least, 0)
    if sampling.top_p < 1:
        wanted = sampling.top_p * weights.sum(1, dtype=torch.float64)  # [B]
        count = CANDIDATES
        while True:
            likeliest = weights.topk(min(count, weights.shape[1])).values  # [B, count], falling
            running = likeliest.cumsum(1, dtype=torch.float64)
            if count >= weights.shape[1] or bool((running[:, -1] >= wanted).all()):
                break
            count *= 16
        enough = (running < wanted[:, None]).sum(1).clamp(max=likeliest.shape[1] - 1)  # the last one kept
        weights.masked_fill_(weights < likeliest.gather(1, enough[:, None]), 0)
