"""A causal language model that answers in log-probabilities of given tokens.

Knows transformers' models, no loss and no rank. Letters: R rows, T tokens in a row, K trained
positions, d hidden width, V vocabulary.

The body runs on the whole batch; the head runs in chunks at the trained positions alone, with the
parameters of the model itself, inside this module's `forward`: a wrapper that gathers parameters
around it gathers the head's once, however many chunks there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from framework.batch import Batch, Distribution, Outputs
from framework.losses.candidates import candidate_logps, likeliest_logps
from framework.losses.logprobs import token_logps
from framework.losses.whole import Head, compared
from framework.models import adapters, attention
from framework.models.noise import noisy

NOTHING: frozenset[str] = frozenset()


class Policy(nn.Module):
    """`lm` is a transformers causal language model, plain or inside a peft model.

    `neftune_alpha` adds noise to embeddings while training, see `models.noise`; rows must not share tokens.
    """

    def __init__(self, lm: nn.Module, *, head_chunk_tokens: int, neftune_alpha: float | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.neftune_alpha = neftune_alpha
        self.head_chunk_tokens = head_chunk_tokens
        self.head_scale, self.head_softcap = head_rules(causal_lm(lm).config)

    def forward(
        self,
        batch: Batch,
        *,
        needs: frozenset[str] = NOTHING,
        adapter: bool = True,
        temperature: float = 1.0,
        distribution: Distribution | None = None,
    ) -> Outputs:
        """Log-probabilities [K] of `batch.targets`, of logits divided by `temperature`.

        `needs` may name other fields of `Outputs`: "entropies", "mean_logps", "collisions". A `distribution`
        asks for candidates instead, which have a temperature of their own.
        `adapter=False` asks the frozen model under the adapters, for use inside `Engine.inference`. Raises
        ValueError when there are none.
        """
        lm = causal_lm(self.lm)
        noise = self.neftune_alpha if self.training else None
        with contextlib.nullcontext() if adapter else adapters.without(lm), noisy(lm, batch, noise):
            hidden = body(lm, batch)  # [K, d]
        head = lm.get_output_embeddings()
        rules: dict[str, Any] = {
            "bias": getattr(head, "bias", None),
            "chunk": self.head_chunk_tokens,
            "scale": self.head_scale,
            "softcap": self.head_softcap,
        }
        if distribution is not None:
            assert not needs, "candidates come alone"
            assert temperature == 1.0, "candidates have a temperature of their own"
            return _candidates(hidden, head.weight, batch, distribution, rules)
        logps, entropies, mean_logps, collisions = token_logps(
            hidden,
            head.weight,
            batch.targets,
            **rules,
            temperature=temperature,
            entropies="entropies" in needs,
            means="mean_logps" in needs,
            collisions="collisions" in needs,
        )
        return Outputs(logps, entropies, mean_logps, collisions)

    def blocks(self) -> Sequence[nn.Module]:
        """The decoder layers, in order: what is sharded, and recomputed, as a unit."""
        return layers(causal_lm(self.lm).base_model)


def _candidates(
    hidden: Tensor, weight: Tensor, batch: Batch, asked: Distribution, rules: dict[str, Any]
) -> Outputs:
    """What the head says of the tokens asked for."""
    if asked.deferred:
        return Outputs(hidden.new_empty(0), head=_head(hidden, weight, asked, rules))
    rules = rules | {"vocabulary": asked.vocabulary, "temperature": asked.temperature}
    if asked.divergence is not None:
        logps, divergences, counted, metrics = compared(
            hidden, weight, batch.targets, asked.teacher, asked.divergence, batch.weights, **rules
        )
        return Outputs(logps, divergences=divergences, counted=counted, metrics=metrics)
    if asked.likeliest is not None:
        found = likeliest_logps(hidden, weight, batch.targets, asked.likeliest, **rules)
    else:
        assert asked.ids is not None
        found = candidate_logps(hidden, weight, batch.targets, asked.ids, **rules)
    return Outputs(found.targets, candidate_ids=found.ids, candidate_logps=found.logps)


def _head(hidden: Tensor, weight: Tensor, asked: Distribution, rules: dict[str, Any]) -> Head:
    """A copy, where none is there: what a wrapper has gathered for the forward pass is gone after it."""
    if asked.teacher is not None:
        return asked.teacher._replace(hidden=hidden)
    rows = asked.vocabulary
    bias = None if rules["bias"] is None else rules["bias"][:rows].clone()
    kept = weight[:rows].to(hidden.dtype, copy=True)
    return Head(hidden, kept, bias, rules["scale"], rules["softcap"])


def body(lm: Any, batch: Batch) -> Tensor:
    """[K, d]: what a transformers model's body makes of a batch, at its trained positions."""
    answer = lm.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **attention.keywords(batch, lm.config._attn_implementation),
    )
    return answer.last_hidden_state.flatten(0, 1).index_select(0, batch.trained)


def layers(module: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers of a transformers model's body, in order."""
    lists: list[Any] = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
    largest: Any = max(lists, key=lambda each: sum(p.numel() for p in each.parameters()))
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
