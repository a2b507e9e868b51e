"""Floating-point operations of a training pass, from a model's structure: what MFU is measured in.

Knows shapes, no data and no device. Counted are the products that training needs: forward, the gradients of
inputs and, where weights are trained, theirs; a product of an element is 2 operations. What is computed a
second time (checkpointed blocks, the chunks of the head) is not counted, nor are norms, gates and lookups.
Attention counts causal pairs of a query and a key, half of a square.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from framework.models.policy import causal_lm

FORWARD_AND_INPUT = (
    4  # operations of a weight on one token: its product, and the one for its input's gradient
)
WEIGHT = 2  # and the one for its own gradient
PASSES = 3  # attention's backward pass takes twice its forward pass


@dataclass(frozen=True)
class Flops:
    """Of one forward and backward pass, by what they grow with."""

    token: float  # per token: products with the weights of the body
    trained: float  # per trained position: products with the head
    layers: tuple[tuple[int | None, float], ...]  # (window in tokens, per pair of a query and a key)

    def of(self, lengths: Sequence[int], trained: int, *, tokens: int | None = None) -> float:
        """Of segments of `lengths` with `trained` positions; `tokens` where segments share some."""
        total = self.token * (sum(lengths) if tokens is None else tokens) + self.trained * trained
        return total + sum(each * sum(pairs(n, window) for n in lengths) for window, each in self.layers)


def pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, in a causal segment."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def flops(module: Any) -> Flops:
    """Of a `Policy` or a `Scorer`, adapters and frozen weights as they are."""
    lm = causal_lm(module.lm)
    text = lm.config.get_text_config(decoder=True)
    head = lm.score if hasattr(lm, "score") else lm.get_output_embeddings()
    inside = {p: name for block in module.blocks() for name, p in block.named_parameters()}
    linear = {p for each in module.modules() if isinstance(each, nn.Linear) for p in each.parameters(False)}
    token = 0.0
    for p in module.parameters():
        name = inside.get(p, "")
        if p.dim() < 2 or p is head.weight or name.endswith("bias") or not (name or p in linear):
            continue
        share = _active(text, p.shape[0]) if ".experts." in name and p.dim() == 3 else 1.0
        token += p.numel() * share * (FORWARD_AND_INPUT + WEIGHT * p.requires_grad)
    of_head = head.weight.numel() * (FORWARD_AND_INPUT + WEIGHT * head.weight.requires_grad)
    return Flops(token, of_head, _attention(text))


def _attention(text: Any) -> tuple[tuple[int | None, float], ...]:
    """Operations of a pair of a query and a key in all layers of one window: q k and p v, every head."""
    heads = text.num_attention_heads
    keys = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None) or text.hidden_size // heads
    values = getattr(text, "v_head_dim", None) or keys
    each = 2.0 * heads * (keys + values) * PASSES
    window = getattr(text, "sliding_window", None)
    count = text.num_hidden_layers
    kinds = (
        getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    )
    layers = Counter(window if kind == "sliding_attention" else None for kind in kinds)
    return tuple((window, number * each) for window, number in layers.items())


def _active(text: Any, experts: int) -> float:
    """The share of a layer's experts that one token meets."""
    chosen = next(
        (
            n
            for key in ("num_experts_per_tok", "moe_topk", "top_k_experts")
            if (n := getattr(text, key, None))
        ),
        experts,
    )
    return min(1.0, float(chosen if not isinstance(chosen, list) else max(chosen)) / experts)


def parameters(module: Any) -> dict[str, int]:
    """Elements by part: total, trained, blocks, embedding, head, other; tied ones once, in the embedding."""
    lm = causal_lm(module.lm)
    head = (lm.score if hasattr(lm, "score") else lm.get_output_embeddings()).weight
    embedding = lm.get_input_embeddings().weight
    every = list(module.parameters())
    blocks = {p for block in module.blocks() for p in block.parameters()}
    found = {
        "total": sum(p.numel() for p in every),
        "trained": sum(p.numel() for p in every if p.requires_grad),
        "blocks": sum(p.numel() for p in blocks),
        "embedding": embedding.numel(),
        "head": 0 if head is embedding else math.prod(head.shape),
    }
    return found | {"other": found["total"] - found["blocks"] - found["embedding"] - found["head"]}
