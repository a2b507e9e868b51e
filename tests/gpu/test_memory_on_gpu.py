"""What is done to blocks, where it is meant for: the same gradients on a GPU, from less of its memory."""

import pytest
import torch
from rows import batch, segments
from transformers import LlamaConfig, LlamaForCausalLM

from framework.models import attention
from framework.models.policy import Policy
from framework.strategy.memory import Blocks, prepare_blocks

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
ROWS = segments((900, 300, 1500, 40, 1300), 512)


def step(how):
    """(gradients by name, bytes of the device held between forward and backward) in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    attention.register()
    lm = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    lm.set_attn_implementation(attention.choose("auto", DEVICE, config, torch.bfloat16))
    model = Policy(lm, head_chunk_tokens=256)
    prepare_blocks(model, how)
    micro = batch(ROWS).to(DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = -model(micro).logps.sum() / micro.units
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters()}, held


def off(found, expected):
    squares = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((squares / sum(g.square().sum() for g in expected.values())).sqrt())


@pytest.fixture(scope="module")
def plain():
    return step(Blocks("full"))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_offloaded_activations_come_back_and_leave_the_device(checkpointing, plain):
    """8 blocks of 4040 tokens keep 4 MB of input each where all are checkpointed."""
    gradients, held = step(Blocks(checkpointing, offload=True))
    assert off(gradients, plain[0]) < 1e-2  # norms that are not lean round elsewhere
    assert held < plain[1] - 7 * 4040 * 512 * 2


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_blocks_agree(checkpointing, plain):
    gradients, _ = step(Blocks(checkpointing, compiled=True))
    assert off(gradients, plain[0]) < 2e-2
