"""Causal attention within the segments of a packed row, for every implementation that we accept.

Knows tensors and transformers' table of attention functions, no model. Letters: R rows, T tokens in a
row, H query heads, G key heads, D head width, S segments, L tokens in the longest segment of a group.

transformers keeps segments apart by building a [T, T] mask, or not at all when one argument is off.
Here every forward pass carries a `Segments` plan to the attention functions, which work on segments
alone; a packed row without one is refused. No mask over a row is ever built: transformers makes none for
implementations that it has no mask function for, and ours are registered without.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from framework.batch import Batch
from framework.errors import ModelError
from framework.models.layout import Segments, into_rows, out_of_rows, plan

KEYWORD = "segments"  # the keyword that carries the plan through the model to its attention layers
FOREIGN = ("position_bias", "indices", "block_indices", "sinks", "cache")  # attention that ours is not
LACKS = {
    "sdpa": ("capped attention scores",),
    "varlen": ("capped attention scores", "attention dropout", "attention sinks", "heads wider than 256"),
    "flash_attention_2": ("attention sinks", "heads wider than 256"),
    "flash_attention_3": ("attention dropout", "attention sinks", "heads wider than 256"),
}
WITH_SINKS = ("gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash")
FLASH = ("flash_attention_2", "flash_attention_3")
# What transformers calls ours. It reads "sdpa" and "flash" out of names and then thinks it knows them.
OURS = {"auto": "sapwood", "eager": "sapwood_explicit", "sdpa": "sapwood_fused", "varlen": "sapwood_varlen"}
NAMES = (*OURS, *FLASH)

# Up to this length explicit scores beat torch's fused CPU kernel, forward and backward together:
# measured on one AMX core, 9 heads of 64, 1024 tokens: bf16 256 tokens 7 ms against 17, 512 tokens
# 32 against 25; fp32 about even at 128, 46 against 34 at 512.
EAGER_UP_TO = {torch.bfloat16: 320, torch.float16: 320}
EAGER_UP_TO_FP32 = 96


def shares_prompts(implementation: str) -> bool:
    """Whether rows may hold a shared beginning once (`Batch.places`), for a name that `choose` gave.

    The flash-attn kernels are called by transformers, which knows boundaries only.
    """
    return implementation not in FLASH


def keywords(batch: Batch, implementation: str) -> dict[str, Any]:
    """What to hand to the model's body beside its inputs, for `implementation` as `choose` named it."""
    if implementation not in FLASH:
        return {KEYWORD: plan(batch, grouped=implementation != OURS["varlen"])}
    if batch.places is not None:
        raise ValueError(f"{implementation} cannot read rows with shared prompts; see shares_prompts")
    if not batch.packed:
        return {}
    ends = batch.boundaries
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": batch.max_length,
        "max_length_k": batch.max_length,
    }


def choose(name: str, device: torch.device, config: PretrainedConfig, dtype: torch.dtype) -> str:
    """The implementation to build the model with, as transformers knows it.

    `name` is one of NAMES. auto: on CUDA in half precision flash-attn 3, flash-attn 2 (installed, or its
    Hub kernel in the local cache), else torch's varlen kernel; elsewhere per-segment attention that
    takes the faster of fused and explicit scores by length. Raises ModelError for an unknown name, and
    for one that this device, precision or model cannot have.
    """
    if name not in NAMES:
        raise ModelError(f"model.attention={name} is unknown; type one of {', '.join(NAMES)}")
    if name == "auto":
        kernels = ("flash_attention_3", "flash_attention_2", "varlen")
        name = next((kernel for kernel in kernels if not _problem(kernel, device, config, dtype)), "auto")
    elif problem := _problem(name, device, config, dtype):
        raise ModelError(f"model.attention={name} {problem}; type model.attention=auto")
    return OURS.get(name, name)


def _problem(name: str, device: torch.device, config: PretrainedConfig, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot be had here, if it cannot."""
    text = config.get_text_config(decoder=True)
    has = {
        "capped attention scores": getattr(text, "attn_logit_softcapping", None) is not None,
        "attention dropout": bool(getattr(text, "attention_dropout", 0.0)),
        "attention sinks": config.model_type in WITH_SINKS,
        "heads wider than 256": _head_width(text) > 256,
    }
    if cannot := [feature for feature in LACKS.get(name, ()) if has[feature]]:
        return f"cannot do {' or '.join(cannot)}, which {config.model_type} has"
    if name not in LACKS or name == "sdpa":
        return None
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"needs CUDA and precision=bf16, not {device.type} and {str(dtype).removeprefix('torch.')}"
    if name in FLASH and not _flash_installed(name):
        return "is not installed, nor is its Hub kernel in the local cache"
    return None


def _head_width(config: PretrainedConfig) -> int:
    latent = getattr(config, "qk_head_dim", None)
    width = latent or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width)


def _flash_installed(name: str) -> bool:
    """The package, or the Hub kernel that transformers puts in its place; nothing is downloaded for it."""
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[name]
    if importlib.util.find_spec(package) is not None:
        return True
    if importlib.util.find_spec("kernels") is None:
        return False
    from huggingface_hub.constants import HF_HUB_CACHE

    kernel = {"flash_attention_2": "flash-attn2", "flash_attention_3": "vllm-flash-attn3"}[name]
    cached = (Path(HF_HUB_CACHE) / f"{kind}--kernels-community--{kernel}" for kind in ("models", "kernels"))
    return any((path / "snapshots").is_dir() for path in cached)


def _segmented(kind: str) -> Any:
    """The attention function of one implementation, in the form that transformers calls."""

    @torch.compiler.disable  # how rows are cut changes with every micro-batch; blocks are compiled around it
    def attention(
        module: nn.Module,
        query: Tensor,  # [R, H, T, D]
        key: Tensor,  # [R, G, T, D]
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        segments: Segments | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """[R, T, H, D], and no weights."""
        model = type(module).__name__
        if segments is None:
            raise ModelError(
                f"{model} does not hand its keywords on to attention, so the segments of a packed row could "
                "not be told apart: this model is not supported"
            )
        strange = [name for name in FOREIGN if others.get(name) is not None]
        if attention_mask is not None or others.get("is_causal") is False or strange:
            raise ModelError(
                f"{model} asks attention for {', '.join(strange) or 'a mask of its own'}: not supported"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if sliding_window is not None and segments.max_length <= sliding_window:
            sliding_window = None
        rules = Rules(kind, scale, dropout, sliding_window, softcap, s_aux)
        if not segments.packed:
            return _causal(query, key, value, rules).transpose(1, 2).contiguous(), None
        if kind == "varlen":
            return _varlen(query, key, value, segments, rules), None
        return _by_groups(query, key, value, segments, rules), None

    return attention


@dataclass(frozen=True)
class Rules:
    """What one layer asks for, besides causality."""

    kind: str  # auto | eager | sdpa | varlen
    scale: float
    dropout: float
    window: int | None  # keys a query sees, itself included; None: all before it
    softcap: float | None
    sinks: Tensor | None  # [H] a logit of each head that takes weight and gives no value


def _by_groups(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rules: Rules) -> Tensor:
    """[1, T, H, D]: each group is one rectangle of segments, one causal call."""
    tokens = [into_rows(tensor[0].transpose(0, 1), segments) for tensor in (query, key, value)]
    parts = []
    place = 0
    for group in segments.groups:
        size = group.rows * group.length
        q, k, v = (
            tensor[place : place + size].unflatten(0, (group.rows, group.length)).transpose(1, 2)
            for tensor in tokens
        )
        parts.append(_causal(q, k, v, rules).transpose(1, 2).flatten(0, 1))  # [rows * L, H, D]
        place += size
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out_of_rows(out, segments)[None]


def _causal(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """[rows, H, L, D]: causal attention in each row of [rows, H, L, D] queries."""
    length = query.shape[2]
    explicit = rules.softcap is not None or rules.sinks is not None or rules.kind == "eager"
    if rules.kind == "auto" and query.device.type == "cpu":
        explicit |= length <= EAGER_UP_TO.get(query.dtype, EAGER_UP_TO_FP32)
    if rules.window is not None and length > rules.window:
        return _windowed(query, key, value, rules, explicit)
    if explicit:
        return _explicit(query, key, value, rules, _future(length, query.device))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=rules.dropout,
        is_causal=True,
        scale=rules.scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _future(length: int, device: torch.device) -> Tensor:
    """[L, L] True where a key lies after the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)


def _explicit(query: Tensor, key: Tensor, value: Tensor, rules: Rules, hidden: Tensor) -> Tensor:
    """Scores written out, [rows, H, L, keys]; `hidden` [L, keys] is True where a query may not look.

    Query heads that share a key head are stacked on top of each other, so keys are never repeated.
    """
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    stacked = query.reshape(rows, groups, -1, width)  # [rows, G, H/G * L, D]
    scores = ((stacked * rules.scale) @ key.transpose(2, 3)).view(rows, heads, length, -1)
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    # added, not filled in: adding needs nothing in the backward pass
    scores = scores + torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(hidden, -torch.inf)
    if rules.sinks is not None:
        sinks = rules.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(rows, -1, length, 1)
        probabilities = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)  # sums in fp32 inside, for half precision too
    if rules.dropout:
        probabilities = F.dropout(probabilities, rules.dropout)
    mixed = probabilities.reshape(rows, groups, -1, key.shape[2]) @ value
    return mixed.view(rows, heads, length, -1)


def _windowed(query: Tensor, key: Tensor, value: Tensor, rules: Rules, explicit: bool) -> Tensor:
    """Sliding window w in blocks of w queries, each against its own and the block before: [w, 2w] scores.

    Memory and work grow with L * w, not with L * L.
    """
    window = rules.window
    assert window is not None
    rows, length = query.shape[0], query.shape[2]
    blocks = -(-length // window)
    tail = blocks * window - length
    query, key, value = (F.pad(tensor, (0, 0, 0, tail)) for tensor in (query, key, value))

    def by_block(tensor: Tensor) -> Tensor:  # [rows * blocks, heads, w, D]
        return tensor.unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)

    def with_past(tensor: Tensor) -> Tensor:  # [rows * blocks, heads, 2w, D]
        past = F.pad(tensor, (0, 0, window, 0))[:, :, : blocks * window]
        return torch.cat([by_block(past), by_block(tensor)], dim=2)

    query, key, value = by_block(query), with_past(key), with_past(value)
    ahead = torch.arange(2 * window, device=query.device) - window  # key's place in the query's block
    behind = torch.arange(window, device=query.device)[:, None] - ahead  # [w, 2w] how far back a key lies
    outside = (behind < 0) | (behind >= window)
    first = (outside | (ahead < 0)).expand(rows, window, -1)  # the first block has no block before it
    hidden = outside.expand(rows, blocks, window, -1).clone()
    hidden[:, 0] = first
    hidden = hidden.flatten(0, 1)[:, None]  # [rows * blocks, 1, w, 2w]
    if explicit:
        out = _explicit(query, key, value, rules, hidden)
    else:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=~hidden,
            dropout_p=rules.dropout,
            scale=rules.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
    out = out.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)
    return out[:, :, :length]


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rules: Rules) -> Tensor:
    """[1, T, H, D] by torch's own kernel for ragged rows, on CUDA in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (into_rows(tensor[0].transpose(0, 1), segments) for tensor in (query, key, value))
    out = varlen_attn(
        query,
        key,
        value,
        segments.boundaries,
        segments.boundaries,
        segments.max_length,
        segments.max_length,
        scale=rules.scale,
        window_size=(-1 if rules.window is None else rules.window - 1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(out, Tensor)
    return out_of_rows(out, segments)[None]


def register() -> None:
    """Make our implementations known to transformers. Safe to call again."""
    for kind in OURS:
        AttentionInterface.register(OURS[kind], _segmented(kind))
