"""What only a CUDA device can show. Skipped where there is none; every test says what it compares."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

from rows import batch, segments
from test_families import lively, tiny

from framework.losses.candidates import candidate_logps, likeliest_logps
from framework.losses.logprobs import token_logps
from framework.losses.sft import sft
from framework.models import attention
from framework.models.policy import Policy

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
LENGTHS = (200, 3, 130, 1, 41, 17, 64)
CHOICES = ("auto", "eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3")


def _model(kind="llama", **changes):
    """fp32, on the CPU, with heads of 32: the least that flash kernels take."""
    small = {"hidden_size": 128, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 512}
    lm = lively(tiny(kind, **small | changes))
    for parameter in lm.parameters():
        parameter.data.mul_(0.2)
    attention.register()
    return lm


def _step(lm, rows, device, *, packed=True):
    """(logps, {name: gradient}) of one supervised step, in fp32 on the CPU."""
    lm = lm.to(device)
    micro = batch(rows, packed=packed).to(device)
    items = sft(Policy(lm, head_chunk_tokens=100)(micro).logps, micro.weights)
    names, parameters = zip(*lm.named_parameters(), strict=True)
    gradients = torch.autograd.grad(items.total() / micro.units, parameters)
    return -items.loss.detach().cpu(), {n: g.float().cpu() for n, g in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("window", [None, 32])
def test_every_attention_agrees_on_packed_rows_with_fp32_on_the_cpu(name, window):
    """bf16 against fp32: gradients within 3 % in norm, which reading across segments would exceed tenfold."""
    lm = _model("llama" if window is None else "mistral", **({"sliding_window": window} if window else {}))
    rows = segments(LENGTHS, 512)
    lm.set_attn_implementation("sapwood")
    expected, wanted = _step(lm, rows, torch.device("cpu"))
    try:
        chosen = attention.choose(name, DEVICE, lm.config, torch.bfloat16)
    except attention.ModelError as error:
        pytest.skip(str(error))
    lm.bfloat16().set_attn_implementation(chosen)
    for packed in (True, False):
        logps, gradients = _step(lm, rows, DEVICE, packed=packed)
        assert (logps - expected).abs().mean() < 0.02
        for leaf, gradient in gradients.items():
            assert (gradient - wanted[leaf]).norm() < 0.03 * wanted[leaf].norm() + 1e-4, (leaf, packed)


@pytest.mark.parametrize("name", CHOICES)
@torch.no_grad()
def test_no_attention_reads_across_segments(name):
    """Another first segment changes nothing in the later ones, bit for bit."""
    lm = _model()
    try:
        chosen = attention.choose(name, DEVICE, lm.config, torch.bfloat16)
    except attention.ModelError as error:
        pytest.skip(str(error))
    lm.to(DEVICE).bfloat16().set_attn_implementation(chosen)
    policy = Policy(lm, head_chunk_tokens=1000)
    rows = segments(LENGTHS, 512)
    other = [segments((LENGTHS[0],), 512, seed=9)[0], *rows[1:]]
    first, second = (policy(batch(given).to(DEVICE)).logps for given in (rows, other))
    assert torch.equal(first[LENGTHS[0] - 1 :], second[LENGTHS[0] - 1 :])
    assert not torch.equal(first, second)


def test_a_bf16_step_agrees_with_fp32():
    lm = _model()
    lm.set_attn_implementation(attention.choose("auto", DEVICE, lm.config, torch.float32))
    rows = segments(LENGTHS, 512)
    exact, wanted = _step(lm, rows, DEVICE)
    lm.bfloat16().set_attn_implementation(attention.choose("auto", DEVICE, lm.config, torch.bfloat16))
    logps, gradients = _step(lm, rows, DEVICE)
    assert abs(logps.mean() - exact.mean()) < 2e-3
    square = sum((gradients[n] - wanted[n]).square().sum() for n in wanted)
    assert square.sqrt() < 0.02 * sum(g.square().sum() for g in wanted.values()).sqrt()


def _head(tokens=2048, width=256, vocabulary=32_000):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = (0.05 * torch.randn(vocabulary, width, device=DEVICE, dtype=torch.bfloat16)).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), device=DEVICE)


def _fused(kind):
    """-log p per token by a fused kernel of another library."""
    if kind == "cut_cross_entropy":
        library = pytest.importorskip(kind)
        return lambda h, w, t: library.linear_cross_entropy(h, w, t, reduction="none")
    functions = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    apply = functions.LigerFusedLinearCrossEntropyFunction.apply
    return lambda h, w, t: apply(h, w, t, None, None, -100, 0.0, 0.0, "none")[0]


@pytest.mark.parametrize("kind", ["cut_cross_entropy", "liger"])
def test_the_chunked_head_agrees_with_fused_ones(kind):
    hidden, weight, targets = _head()
    theirs = _fused(kind)(hidden, weight, targets).float()
    logps, *_ = token_logps(hidden, weight, targets, chunk=300)
    torch.testing.assert_close(-logps, theirs.detach(), rtol=0, atol=0.03)


def test_the_weights_gradient_is_summed_in_fp32():
    """64 chunks of bf16 against the product in fp32: one rounding at the end, 2^-9, not one per chunk."""
    hidden, weight, targets = _head()
    logps, *_ = token_logps(hidden, weight, targets, chunk=32)
    (gradient,) = torch.autograd.grad(logps.sum(), weight)
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    plain = torch.log_softmax(exact[0] @ exact[1].t(), 1).gather(1, targets[:, None]).sum()
    (wanted,) = torch.autograd.grad(plain, exact[1])
    assert (gradient.float() - wanted).norm() < 6e-3 * wanted.norm()


def test_candidates_are_those_of_whole_logits():
    """The likeliest 20 at temperature 2, and the gradient of the sum of their log-probabilities."""
    hidden, weight, targets = _head()
    options = {"chunk": 300, "temperature": 2.0}
    found = likeliest_logps(hidden, weight, targets, 20, **options)
    answered = candidate_logps(hidden, weight, targets, found.ids, **options)
    torch.testing.assert_close(answered.logps, found.logps)
    (gradient,) = torch.autograd.grad(answered.logps.sum(), weight)
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    plain = torch.log_softmax(exact[0] @ exact[1].t() / 2, 1).gather(1, found.ids)
    torch.testing.assert_close(found.logps, plain.detach(), rtol=0, atol=0.03)
    (wanted,) = torch.autograd.grad(plain.sum(), exact[1])
    assert (gradient.float() - wanted).norm() < 6e-3 * wanted.norm()


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    """Four times the tokens may cost what hidden states cost, not logits: those would be 2 GB in fp32."""
    peaks = []
    for tokens in (4096, 16_384):
        hidden, weight, targets = _head(tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        token_logps(hidden, weight, targets, chunk=512)[0].sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del hidden, weight, targets
    assert peaks[1] - peaks[0] < 2 * (16_384 - 4096) * 256 * 2 + 2**23
