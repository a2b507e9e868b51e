"""Products in 8-bit floats by the hardware: losses as in bf16 within their rounding, and as emulated."""

import pytest
import torch
from decoders import DEVICE, policy
from rows import batch, segments

from framework.strategy.fp8 import CAPABILITY, Fp8, check_fp8
from framework.strategy.memory import PLAIN, Blocks

pytest.importorskip("torchao")

TOO_OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(TOO_OLD, reason="this device has no 8-bit floats: compute capability below 8.9"),
]
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
ROWS = segments((301, 40, 207, 3, 150), 512)  # 701 tokens, which is no multiple of 16


def losses(how, steps=8):
    """Losses a token in bf16 of `steps` steps of AdamW on the same rows, and the last gradients."""
    model = policy(how, width=256, layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    micro, history = batch(ROWS).to(DEVICE), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -model(micro).logps.sum() / micro.units
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history, {name: p.grad.float().cpu() for name, p in model.named_parameters()}


def off(found, expected):
    """Relative distance of two gradients, over all parameters."""
    squares = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((squares / sum(g.square().sum() for g in expected.values())).sqrt())


@pytest.fixture(scope="module")
def plain():
    return losses(PLAIN)[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_stay_near_those_of_bf16(recipe, compiled, plain):
    """5 % of the loss over eight steps, in which it falls by more than a tenth.

    Gradients are off by as much, and AdamW's first steps go by their signs.
    """
    check_fp8(Fp8(recipe), DEVICE)
    found, _ = losses(Blocks(fp8=Fp8(recipe), compiled=compiled))
    assert plain[-1] < 0.9 * plain[0]
    assert found == pytest.approx(plain, rel=0.05)
    assert found != plain


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_hardware_rounds_as_emulation_does(recipe):
    """After one step, from the same weights: nearer to one another than 8 bits are to bf16."""
    (loss,), gradients = losses(Blocks(fp8=Fp8(recipe)), steps=1)
    (emulated,), expected = losses(Blocks(fp8=Fp8(recipe, emulate=True)), steps=1)
    _, exact = losses(PLAIN, steps=1)
    assert loss == pytest.approx(emulated, rel=2e-3)
    assert off(gradients, expected) < off(gradients, exact)
