"""Attention that computes nothing and keeps what fused kernels keep: for planning on the meta device.

torch's own choice there is the one kernel that keeps all scores. Where a model's attention is explicit
anyway (capped scores, sinks), it is the real one. Letters as in `models.attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from framework.models import attention
from framework.models.attention import Rules

NAME, COPYING = "sapwood_planned", "sapwood_planned_copying"
"""Registered with transformers; the second for rows that are sorted by length and come back as a copy."""


class _Fused(torch.autograd.Function):
    """Queries, keys, values, the output and one fp32 number a query and head (Dao et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1])
        lse = query.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def register() -> None:
    """Make both known to transformers. Safe to call again."""
    attention.register()
    AttentionInterface.register(NAME, _planned(copying=False))
    AttentionInterface.register(COPYING, _planned(copying=True))


def _planned(*, copying: bool) -> Any:
    def planned(
        module: nn.Module,
        query: Tensor,  # [R, H, T, D]
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if softcap is not None or s_aux is not None:
            rules = Rules("eager", 1.0, 0.0, None, softcap, s_aux)
            return attention._causal(query, key, value, rules).transpose(1, 2).contiguous(), None
        out = _Fused.apply(query, key, value)
        return (out.clone() if copying else out), None

    return planned
