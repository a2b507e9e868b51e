"""Norms and gates that are computed again give the same numbers and keep less."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from framework.strategy.lean import make_lean

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # only the order of sums differs
IDS = torch.arange(48).view(2, 24) % 40


def model(dtype, *, lora=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lm = LlamaForCausalLM(config).to(dtype)
    if lora:
        lm = get_peft_model(lm, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return lm


def trained(lm):
    """(loss, gradients by name, bytes kept between forward and backward, parameters left out)"""
    parameters = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = lm(IDS, use_cache=False).logits.float().logsumexp(-1).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(size for size, _ in kept.values())


def lean(lm):
    for module in lm.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            make_lean(module)
    return lm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_the_same_from_less_memory(dtype, lora):
    loss, gradients, all_kept = trained(model(dtype, lora=lora))
    found, again, kept = trained(lean(model(dtype, lora=lora)))
    assert torch.equal(found, loss)
    assert again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        distance = (again[name].double() - gradient.double()).norm() / gradient.double().norm()
        assert distance < TOLERANCE[dtype], (name, distance)
    assert kept < 0.8 * all_kept


def test_nothing_is_computed_twice_without_gradients():
    lm = lean(model(torch.float32))
    with torch.no_grad():
        assert torch.equal(lm(IDS).logits, model(torch.float32)(IDS).logits)


def test_a_second_backward_pass_adds():
    lm, plain = lean(model(torch.float32)), model(torch.float32)
    for _ in range(2):
        for each in (lm, plain):
            each(IDS, use_cache=False).logits.square().mean().backward()
    for (name, one), (_, other) in zip(lm.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-7), name
