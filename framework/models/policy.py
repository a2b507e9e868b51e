"""A causal language model that answers in log-probabilities of given tokens.

Knows transformers' models, no loss and no rank. Letters: R rows, T tokens in a row, K trained
positions, d hidden width, V vocabulary.

The body runs on the whole batch; the head runs in chunks at the trained positions alone, with the
parameters of the model itself, inside this module's `forward`: a wrapper that gathers parameters
around it gathers the head's once, however many chunks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from framework.batch import Batch, Outputs
from framework.losses.logprobs import token_logps
from framework.models import attention

NOTHING: frozenset[str] = frozenset()


class Policy(nn.Module):
    """`lm` is a transformers causal language model, plain or inside a peft model."""

    def __init__(self, lm: nn.Module, *, head_chunk_tokens: int) -> None:
        super().__init__()
        self.lm = lm
        self.head_chunk_tokens = head_chunk_tokens
        self.head_scale, self.head_softcap = head_rules(causal_lm(lm).config)

    def forward(self, batch: Batch, *, needs: frozenset[str] = NOTHING) -> Outputs:
        """Log-probabilities of `batch.targets` [K]; `needs` may name "entropies" and "mean_logps"."""
        lm = causal_lm(self.lm)
        answer = lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention.keywords(batch, lm.config._attn_implementation),
        )
        hidden = answer.last_hidden_state.flatten(0, 1).index_select(0, batch.trained)  # [K, d]
        head = lm.get_output_embeddings()
        logps, entropies, mean_logps = token_logps(
            hidden,
            head.weight,
            batch.targets,
            bias=getattr(head, "bias", None),
            chunk=self.head_chunk_tokens,
            scale=self.head_scale,
            softcap=self.head_softcap,
            entropies="entropies" in needs,
            means="mean_logps" in needs,
        )
        return Outputs(logps, entropies, mean_logps)

    def blocks(self) -> Sequence[nn.Module]:
        """The decoder layers, in order: what is sharded, and recomputed, as a unit."""
        body = causal_lm(self.lm).base_model
        lists: list[Any] = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
        largest: Any = max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))
        return list(largest)


def causal_lm(lm: Any) -> Any:
    """The transformers model itself, out of a peft model if it is in one."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def head_rules(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) of a family's logits: Cohere multiplies, Granite divides, Gemma caps."""
    text = config.get_text_config(decoder=True)
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(
        getattr(text, "logits_scaling", None) or 1.0
    )
    return scale, getattr(text, "final_logit_softcapping", None)
