"""What is done to blocks, where it is meant for: the same gradients on a GPU, from less of its memory."""

import pytest
import torch
from decoders import DEVICE, policy
from rows import batch, segments

from framework.strategy.memory import Blocks

pytestmark = pytest.mark.gpu
ROWS = segments((900, 300, 1500, 40, 1300), 512)


def step(how):
    """(gradients by name, bytes of the device held between forward and backward) in bf16."""
    model = policy(how, width=512, layers=8)
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
