"""Which model families our forward pass reproduces, and which it refuses by name.

Knows configurations, no weights. A family is *verified* when the tests compare it, packed, with a sliding
window and all, with its own forward pass. Any other family that has the right structure is accepted on
trial: `prove` compares the two on the real weights before training begins.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from framework.batch import Batch
from framework.errors import ModelError

VERIFIED = frozenset(
    """
    afmoe arcee bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 diffllama ernie4_5 exaone4 flex_olmo
    gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax internlm3 jais2 llama minicpm3
    ministral ministral3 mistral mixtral nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2
    qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2 vaultgemma youtu
    """.split()
)
WRONG = {
    "phimoe": "its forward pass differs from ours by more than rounding",
    "nemotron": "it does not tell attention where packed examples begin",
    "stablelm": "it does not tell attention where packed examples begin",
}
LAYERS = {"full_attention", "sliding_attention"}
TRIAL = (7, 1, 5)  # tokens in the segments of the trial

# Largest mean difference of log-probabilities in nats that rounding explains. Reading across segments, or
# a head without its scale, is off by 0.1 and more even where the model is indifferent.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
ROUNDING_HALF = 0.05


def check(config: Any, *, head: str = "lm") -> None:
    """Raises ModelError for a model that our forward pass cannot reproduce, from its configuration alone.

    With `head` "score" also for one that transformers could not load with such a head.
    """
    kind = config.model_type
    text = config.get_text_config(decoder=True)
    layers = set(getattr(text, "layer_types", None) or LAYERS)
    reason = WRONG.get(kind)
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        reason = "transformers has no causal language model of this type"
    elif text is not config:
        reason = f"it wraps a text model of type {text.model_type} in something larger"
    elif layers - LAYERS:
        reason = f"its {', '.join(sorted(layers - LAYERS))} layers mix packed examples"
    elif any(hasattr(config, name) for name in ("ssm_cfg", "mamba_d_state", "state_size", "conv_kernel")):
        reason = "its recurrent layers mix packed examples"
    elif kind not in VERIFIED and getattr(config, "sliding_window", None):
        reason = "it has a sliding window and its family was not verified"
    if reason:
        raise ModelError(
            f"model type {kind} is not supported: {reason}. Set model.path to a decoder such as Llama, Qwen, "
            "Mistral, Gemma, Phi, Granite or OLMo"
        )
    if head == "score" and kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        known = VERIFIED & MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys()
        raise ModelError(
            f"model type {kind} cannot be a reward model or a critic: transformers has no sequence "
            f"classification of this type, so nobody could load it. Use one of {', '.join(sorted(known))}"
        )


@torch.no_grad()
def prove(model: Any, lm: Any) -> None:
    """Compare `model` on a packed row with `lm`'s own forward pass, example by example.

    `lm` is the transformers model that the `Policy` or `Scorer` wraps, with its weights. Raises ModelError.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.config.vocab_size, (sum(TRIAL),), generator=generator)
    ours = model(_packed(ids))[0]  # [K]
    own = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    off = (ours - torch.cat([_own(lm, row) for row in ids.split(TRIAL)])).abs().mean().item()
    lm.set_attn_implementation(own)
    if not off <= ROUNDING.get(lm.dtype, ROUNDING_HALF):
        raise ModelError(
            f"model type {lm.config.model_type} is not supported: on packed examples our forward pass is "
            f"off by {off:.3g} a token from its own. Set model.path to a model of a verified family: "
            f"{', '.join(sorted(VERIFIED))}"
        )


def _own(lm: Any, row: torch.Tensor) -> torch.Tensor:
    """What `lm` itself answers at every token of a row [T] but the last: scores, or log-probabilities."""
    if hasattr(lm, "score"):
        hidden = lm.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]
        return lm.score(hidden)[:, 0].float()
    logits = lm(input_ids=row[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, row[1:, None])[:, 0]


def _packed(ids: torch.Tensor) -> Batch:
    """All of TRIAL in one row, every next token trained."""
    ends = torch.tensor(TRIAL).cumsum(0).tolist()
    trained = torch.tensor([t for t in range(ends[-1]) if t + 1 not in ends])
    return Batch(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(n) for n in TRIAL])[None],
        boundaries=torch.tensor([0, *ends], dtype=torch.int32),
        trained=trained,
        targets=ids[trained + 1],
        weights=torch.ones(len(trained)),
        segments=torch.bucketize(trained, torch.tensor(ends), right=True),
        sources=torch.zeros(len(TRIAL), dtype=torch.int64),
        packed=True,
        max_length=max(TRIAL),
        units=float(len(trained)),
    )
