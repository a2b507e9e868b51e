"""Which layers model.fp8 reaches, what a run says of it, and models it is refused for, before any weight."""

import json
import sys

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from framework.config import build, fp8
from framework.config.compose import compose
from framework.errors import ConfigError, ModelError


@pytest.fixture
def given(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "one two", "completion": "three"}) + "\n")
    return [
        f"data.train=[{{path: {rows}}}]",
        f"data.cache_dir={tmp_path}",
        "steps=1",
        "model.fp8=tensorwise",
        "model.fp8_emulate=true",
    ]


def inspected(given, model):
    return build.inspect(compose([*given, f"model.path={model}"]))


def test_what_is_converted_and_what_stays_is_said(given, tiny_model_dir):
    """Three blocks of four attention layers of 32 and 16 channels; feed-forward layers have 72."""
    found = inspected(given, tiny_model_dir)
    reach = fp8.reach(found)
    assert reach.converted == 12
    assert reach.left == tuple(f"{b}.mlp.{name}_proj" for b in range(3) for name in ("gate", "up", "down"))
    assert fp8.told(found) == (
        "fp8 (tensorwise, emulated): 12 linear layers; 9 stay in bf16, whose dimensions are no multiples of "
        "16, such as 0.mlp.gate_proj"
    )


def test_nothing_is_said_where_it_was_not_asked_for(given, tiny_model_dir):
    found = inspected([*given, "model.fp8=null", "model.fp8_emulate=false"], tiny_model_dir)
    assert fp8.told(found) is None
    fp8.check(found)


def test_a_model_without_layers_that_fit_is_refused(given, tmp_path):
    """GPT-2's are of a class of their own."""
    words = tiny.tokenizer()
    config = GPT2Config(vocab_size=len(words), n_embd=32, n_layer=1, n_head=2)
    model = tiny.save(GPT2LMHeadModel(config), words, tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"no linear layer .* multiples of 16 in a model of type gpt2"):
        fp8.reach(inspected(given, model))


def test_a_mixture_of_experts_is_refused(given, tmp_path):
    words = tiny.tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = tiny.save(Qwen3MoeForCausalLM(config), words, tmp_path / "moe")
    with pytest.raises(ModelError, match=r"found a mixture of experts .* type model\.fp8=null"):
        fp8.reach(inspected(given, model))


def test_a_missing_package_is_refused_before_data_is_read(given, tiny_model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(build.environment, "sources", lambda run: pytest.fail("data was read"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"type pip install 'sapwood\[fp8\]'"):
        build.prepare(compose([*given, f"model.path={tiny_model_dir}"]))
