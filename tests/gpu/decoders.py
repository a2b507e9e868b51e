"""Small Llamas in bf16 on the device, with what was asked for done to their blocks."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from framework.models import attention
from framework.models.policy import Policy
from framework.strategy.memory import Blocks, prepare_blocks

DEVICE = torch.device("cuda")


def policy(how: Blocks, *, width: int, layers: int) -> Policy:
    """Always the same weights; a head of 64 dimensions each, and two of keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
    )
    attention.register()
    lm = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    lm.set_attn_implementation(attention.choose("auto", DEVICE, config, torch.bfloat16))
    model = Policy(lm, head_chunk_tokens=256)
    prepare_blocks(model, how)
    return model
