"""Compiled blocks: the same numbers, one graph for all blocks and for every number of tokens."""

import pytest
import torch
from rows import batch, segments
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from framework.errors import ConfigError
from framework.models import attention
from framework.models.policy import Policy
from framework.strategy import compiled
from framework.strategy.memory import Blocks, prepare_blocks

VOCABULARY = 40
ROWS = [
    segments(lengths, VOCABULARY) for lengths in ((20, 3, 13, 1, 41), (7, 33), (5, 5, 30, 31, 80), (17, 2))
]


def policy(how):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    attention.register()
    lm = LlamaForCausalLM(config).float()
    lm.set_attn_implementation(attention.OURS["auto"])
    model = Policy(lm, head_chunk_tokens=100)
    prepare_blocks(model, how)
    return model


def steps(model):
    """[(log-probabilities, gradients by name)] of every micro-batch."""
    answers = []
    for rows in ROWS:
        micro = batch(rows)
        model.zero_grad()
        logps = model(micro).logps
        (-logps.sum() / micro.units).backward()
        answers.append((logps.detach(), {name: p.grad for name, p in model.named_parameters()}))
    return answers


@pytest.mark.slow  # a C++ compiler runs
def test_compiled_blocks_give_the_same_gradients_from_few_graphs():
    """Three blocks, four numbers of tokens; also where blocks are computed again, or kept elsewhere."""
    expected = steps(policy(Blocks()))
    for how in (Blocks(compiled=True), Blocks("selective", offload=True, compiled=True)):
        torch._dynamo.reset()
        counters.clear()
        found = steps(policy(how))
        for (logps, gradients), (others, wanted) in zip(found, expected, strict=True):
            torch.testing.assert_close(logps, others, rtol=1e-5, atol=1e-5)
            scale = max(float(gradient.abs().max()) for gradient in wanted.values())
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5 * scale)
        # two halves around attention, twice where one number of tokens was special
        assert 0 < counters["stats"]["unique_graphs"] <= 6


def test_a_missing_compiler_is_refused():
    from torch._inductor import config

    compiled.check_compiler(torch.device("cpu"))
    missing = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*type model\.compile=none"):
        compiled.check_compiler(torch.device("cpu"))
