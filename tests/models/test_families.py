"""Every verified family: our packed forward pass against the family's own, example by example."""

import inspect

import pytest
import torch
from rows import batch, one_by_one, segments
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from framework.errors import ModelError
from framework.models import attention, families
from framework.models.policy import Policy

LENGTHS = (9, 1, 6, 9)
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 48,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_group": 1,
    "first_k_dense_replace": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
CAPPED = ("gemma2", "vaultgemma")


def tiny(kind, **changes):
    """A configuration of family `kind` with two small layers, and a window of 4 where it can have one."""
    cls = CONFIG_MAPPING[kind]
    default = cls()
    names = set(inspect.signature(cls.__init__).parameters)
    given = {name: value for name, value in TINY.items() if name in names or hasattr(default, name)}
    if hasattr(default, "qk_nope_head_dim"):  # latent attention has no key heads of its own
        given["num_key_value_heads"] = 4
        del given["head_dim"]
    if getattr(default, "layer_types", None):
        given["layer_types"] = (list(dict.fromkeys(default.layer_types)) * 2)[:2]
    if hasattr(default, "use_sliding_window"):
        given["use_sliding_window"] = True
    if hasattr(default, "max_window_layers"):
        given["max_window_layers"] = 0
    return cls(**given | changes)


def lively(config, seed=0, auto=AutoModelForCausalLM):
    """A model in fp32 whose logits differ clearly, in its own eager attention."""
    torch.manual_seed(seed)
    lm = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return lm


@pytest.mark.parametrize("kind", sorted(families.VERIFIED))
@torch.no_grad()
def test_packed_logps_are_those_of_the_family_itself(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    config = tiny(kind)
    families.check(config)
    lm = lively(config)
    rows = segments(LENGTHS, 64)
    expected = one_by_one(lm, rows)
    attention.register()
    for name in ("auto", "eager") if kind in CAPPED else ("auto", "eager", "sdpa"):
        lm.set_attn_implementation(
            attention.choose(name, torch.device("cpu"), config, torch.float32),
        )
        policy = Policy(lm, head_chunk_tokens=5)
        for packed in (True, False):
            logps = policy(batch(rows, packed=packed)).logps
            torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    assert len(policy.blocks()) == 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("mamba", "layers mix packed|recurrent"),
        ("jamba", "layers mix packed|recurrent"),
        ("qwen3_next", "linear_attention layers mix packed"),
        ("vit", "no causal language model"),
        ("gemma3", "wraps a text model"),
        ("phimoe", "differs from ours"),
    ],
)
def test_what_cannot_be_done_right_is_refused_by_name(kind, words):
    with pytest.raises(ModelError, match=f"model type {kind} is not supported: .*({words})"):
        families.check(CONFIG_MAPPING[kind]())


def test_the_trial_passes_a_right_model_and_catches_a_wrong_head():
    lm = lively(tiny("llama"))
    attention.register()
    lm.set_attn_implementation("sapwood")
    policy = Policy(lm, head_chunk_tokens=8)
    families.prove(policy, lm)
    assert lm.config._attn_implementation == "sapwood"
    policy.head_scale = 0.5
    with pytest.raises(ModelError, match=r"llama is not supported: .* a token"):
        families.prove(policy, lm)
