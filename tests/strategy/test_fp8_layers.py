"""Linear layers in 8-bit floats: as near to plain ones as the format allows, and no nearer.

Without emulation the products are those of torch's CPU kernels: the code of the hardware's way, padding
included, is run here too.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import nn

from framework.errors import ConfigError
from framework.strategy import fp8
from framework.strategy.fp8 import Fp8
from framework.strategy.memory import Blocks, prepare_blocks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
E4M3, E5M2 = 2**-4, 2**-3  # half a step of 3 and of 2 bits of mantissa, relative
SMALLEST = 2**-10 / 224  # half a step of e4m3's subnormal numbers, as a share of the largest magnitude


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 48)
        self.odd = nn.Linear(48, 40, bias=False)  # 40 is no multiple of 16
        self.last = nn.Linear(40, 64, bias=False)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return x + self.norm(self.last(torch.relu(self.odd(self.first(x)))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 32)

    def blocks(self):
        return list(self.layers)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(x)


def model(how, dtype=torch.float32):
    torch.manual_seed(0)
    made = Model().to(dtype)
    prepare_blocks(made, how)
    return made


def passed(layer, x, grad):
    """(output, gradient of the input, of the weight, of the bias)"""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


def bound(left, right, rounding):
    """[M, N]: how far the product of `left` [M, K] and `right` [K, N] may be off where both are rounded.

    (a + da) (b + db) - a b <= |da| |b| + |a| |db| + |da| |db|, with |da| at most `rounding` of a, or half a
    step of the smallest numbers, relative to the largest of the tensor.
    """
    a, b = left.abs(), right.abs()
    da = rounding[0] * a + SMALLEST * a.max()
    db = rounding[1] * b + SMALLEST * b.max()
    return da @ b + a @ db + da @ db


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("emulate", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_as_near_as_the_format_allows(recipe, emulate, dtype):
    """37 tokens, which is no multiple of 16."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    plain = nn.Linear(64, 48).to(dtype)
    layers = nn.ModuleList([nn.Linear(64, 48).to(dtype)])
    layers[0].load_state_dict(plain.state_dict())
    fp8.convert_block(layers, Fp8(recipe, emulate=emulate))
    x, grad = torch.randn(37, 64, dtype=dtype), torch.randn(37, 48, dtype=dtype)
    found, expected = passed(layers[0], x, grad), passed(plain, x, grad)
    weight = plain.weight.detach()
    gradients = E5M2 if recipe == "tensorwise" else E4M3
    exact = recipe == "rowwise_with_gw_hp"
    bounds = [
        bound(x.float(), weight.float().T, (E4M3, E4M3)),
        bound(grad.float(), weight.float(), (gradients, E4M3)),
        0 * weight.float() if exact else bound(grad.float().T, x.float(), (gradients, E4M3)),
        torch.zeros(48),
    ]
    kept = 2**-8 if dtype == torch.bfloat16 else 1e-6
    if dtype == torch.float32 and not emulate:
        kept = 2**-8  # torch's product by rows answers in bf16
    for ours, theirs, allowed in zip(found, expected, bounds, strict=True):
        off = (ours.float() - theirs.float()).abs()
        assert ours.dtype == dtype
        assert (off <= allowed + 2 * kept * theirs.float().abs() + kept * theirs.float().abs().max()).all()
    for ours, theirs in list(zip(found, expected, strict=True))[: 2 if exact else 3]:
        relative = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert relative > 2**-7, "nothing was rounded to 8 bits"


def test_a_layer_keeps_its_parameters_and_what_does_not_fit_stays():
    pytest.importorskip("torchao")
    plain = model(Blocks())
    made = model(Blocks())
    before = dict(made.named_parameters())
    prepare_blocks(made, Blocks(fp8=Fp8("tensorwise", emulate=True)))
    after = dict(made.named_parameters())
    assert list(after) == list(before) == list(plain.state_dict())
    assert all(after[name] is parameter for name, parameter in before.items())
    changed = [name for name, module in made.named_modules() if type(module).__name__ == "Float8Linear"]
    assert changed == ["layers.0.first", "layers.1.first"]
    assert [(name, fits) for name, _, fits in fp8.linear_layers(plain.layers[0])] == [
        ("first", True),
        ("odd", False),
        ("last", False),
    ]


def step(how):
    made = model(how)
    torch.manual_seed(1)
    made(torch.randn(29, 64)).square().mean().backward()
    return {name: p.grad for name, p in made.named_parameters()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_and_moved_activations_change_no_bit(recipe):
    pytest.importorskip("torchao")
    how = Blocks(fp8=Fp8(recipe, emulate=True))
    expected = step(how)
    for other in (replace(how, checkpointing="full"), replace(how, checkpointing="selective", offload=True)):
        found = step(other)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.slow  # a C++ compiler runs
def test_compiled_blocks_round_alike():
    pytest.importorskip("torchao")
    how = Blocks(fp8=Fp8("rowwise", emulate=True))
    expected, found = step(how), step(replace(how, compiled=True))
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=1e-3 * scale)


def test_a_missing_package_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no package torchao.*type pip install 'sapwood\[fp8\]'"):
        fp8.check_fp8(Fp8("tensorwise", emulate=True), CPU)


@pytest.mark.parametrize(("capability", "works"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_a_device_without_8_bit_floats_is_refused(capability, works, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    fp8.check_fp8(Fp8("tensorwise", emulate=True), CUDA)
    if works:
        return fp8.check_fp8(Fp8("tensorwise"), CUDA)
    with pytest.raises(
        ConfigError, match=r"Some GPU, of compute capability 8\.0; expected .*fp8_emulate=true"
    ):
        fp8.check_fp8(Fp8("tensorwise"), CUDA)


def test_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"found a device of type cpu.*type model\.fp8=null"):
        fp8.check_fp8(Fp8("rowwise"), CPU)
