"""What a training pass computes: by hand, against torch's own counter, and parameters of published models."""

import pytest
import torch
from rows import batch, segments
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config

from framework.models import adapters, attention
from framework.models.adapters import Lora
from framework.models.attention import OURS
from framework.models.flops import Flops, flops, pairs, parameters
from framework.models.policy import Policy

V, D, INNER, LAYERS, HEADS, GROUPS, WIDTH = 96, 32, 48, 3, 4, 2, 8
TOKENS, LENGTH = 40, 20
ATTENTION = D * HEADS * WIDTH * 2 + D * GROUPS * WIDTH * 2  # q and o, k and v
GATED = 3 * D * INNER


def policy(lora=None, **changes):
    attention.register()
    config = LlamaConfig(
        **{
            "vocab_size": V,
            "hidden_size": D,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": GROUPS,
            **changes,
        }
    )
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=OURS["eager"])
    return Policy(adapters.attach(lm, lora) if lora else lm, head_chunk_tokens=16)


def test_by_hand():
    found = flops(policy())
    assert found.token == 6 * LAYERS * (ATTENTION + GATED)
    assert found.trained == 6 * V * D
    assert found.layers == ((None, 12 * LAYERS * HEADS * WIDTH),)
    # one segment of 3 tokens sees 1 + 2 + 3 keys
    assert Flops(100, 10, ((None, 1),)).of([3], 2) == 300 + 20 + 6
    assert Flops(100, 10, ((None, 1),)).of([3, 3], 2, tokens=4) == 400 + 20 + 12  # two tokens shared


def test_frozen_weights_cost_two_thirds_and_adapters_their_own():
    rank = 2
    ins_and_outs = 2 * (D + HEADS * WIDTH) + 2 * (D + GROUPS * WIDTH) + 3 * (D + INNER)
    found = flops(policy(Lora(rank, 4)))
    assert found.token == LAYERS * (4 * (ATTENTION + GATED) + 6 * rank * ins_and_outs)
    assert found.trained == 4 * V * D


def counted(model):
    """(what torch counted, trained positions), in bf16: it does not know the product in place of fp32."""
    model.bfloat16()
    rows = batch(segments([LENGTH] * (TOKENS // LENGTH), V), packed=False)
    with FlopCounterMode(display=False) as counter:
        model(rows).logps.sum().backward()
    return counter.get_total_flops(), len(rows.trained)


@pytest.mark.parametrize("tied", [True, False])
def test_torch_counts_the_same(tied):
    """Explicit scores are whole squares, and the head's product is computed a second time."""
    model = policy(tie_word_embeddings=tied)
    found, trained = counted(model)
    formula = flops(model)
    square = formula.layers[0][1] * LENGTH**2 * TOKENS / LENGTH
    assert found == formula.token * TOKENS + formula.trained * trained + square + 2 * V * D * trained


def test_torch_counts_the_same_with_adapters():
    """But for the first block's q, k and v, of whose input nobody asks a gradient."""
    rank = 2
    model = policy(Lora(rank, 4))
    found, trained = counted(model)
    formula = flops(model)
    square = formula.layers[0][1] * LENGTH**2 * TOKENS / LENGTH
    unasked = 2 * D * (HEADS + 2 * GROUPS) * WIDTH + 2 * 3 * rank * D
    assert found == (formula.token - unasked) * TOKENS + (formula.trained + 2 * V * D) * trained + square


def test_a_window_bounds_what_is_seen():
    """5 tokens that see 2 keys each, the first one 1."""
    assert [pairs(5), pairs(5, 2), pairs(2, 4)] == [15, 9, 3]
    config = {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    found = flops(policy(**config))
    assert dict(found.layers) == {4: 2 * 12 * HEADS * WIDTH, None: 12 * HEADS * WIDTH}


def built(config):
    with torch.device("meta"):
        return Policy(AutoModelForCausalLM.from_config(config), head_chunk_tokens=1)


def test_a_token_meets_some_experts():
    sizes = {"hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": 1, "vocab_size": V}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH}
    model = built(MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))
    assert flops(model).token == 6 * (ATTENTION + 2 * GATED + 4 * D)  # and the router


PUBLISHED = {  # as the hub counts the elements of their safetensors
    "Llama-3.1-8B": (
        8_030_261_248,
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    ),
    "SmolLM2-135M": (
        134_515_008,
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    total, config = PUBLISHED[name]
    found = parameters(built(config))
    assert found["total"] == found["trained"] == total
    assert found["embedding"] == config.vocab_size * config.hidden_size
    assert found["head"] == (0 if config.tie_word_embeddings else found["embedding"])
    assert found["blocks"] + found["embedding"] + found["head"] + found["other"] == total
    assert found["other"] == config.hidden_size  # the last norm
