"""Weights in four bits on a CUDA device: the bits of the CPU, with bitsandbytes' kernel and without it."""

import pytest
import torch

from framework.models import nf4

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def kept(rows=300, width=1024, *, double):
    torch.manual_seed(0)
    return nf4.quantised(torch.rand(rows, 1) * torch.randn(rows, width), double=double)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_comes_back_as_on_the_cpu(dtype, double, monkeypatch):
    given = kept(double=double)
    there = {name: tensor.to(DEVICE) for name, tensor in given.items()}
    monkeypatch.setattr(nf4, "has_kernel", lambda: False)
    found = nf4.dequantised(there, dtype)
    torch.testing.assert_close(found.cpu(), nf4.dequantised(given, dtype), rtol=1e-6 if double else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_brings_back_the_same_bits(dtype):
    pytest.importorskip("bitsandbytes")
    there = {name: tensor.to(DEVICE) for name, tensor in kept(double=False).items()}
    found = nf4.by_kernel(there["codes"], nf4._scales(there), dtype)
    assert torch.equal(found.cpu(), nf4.dequantised(kept(double=False), dtype))


def test_a_product_and_its_gradient():
    """Against a plain product with the same weight in bf16."""
    linear = torch.nn.Linear(1024, 300, bias=False).requires_grad_(False)
    layer = nf4.Nf4Linear(linear, double=False)
    for name, tensor in kept(double=False).items():
        getattr(layer, name).copy_(tensor)
    layer.to(DEVICE)
    weight = nf4.dequantised(dict(layer.named_parameters()), torch.bfloat16)
    x = torch.randn(64, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, expected = layer(x), other @ weight.T
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, other.grad)
