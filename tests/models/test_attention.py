"""Packed equals padded equals one by one, in values and gradients, for every name that we accept."""

import pytest
import torch
from largest import Largest
from rows import batch, one_by_one, segments
from test_families import lively, tiny

from framework.errors import ModelError
from framework.models import attention
from framework.models.policy import Policy

CPU = torch.device("cpu")
LENGTHS = (40, 3, 130, 1, 41, 17, 39)  # several groups, of one and of many rows
NAMES = ("auto", "eager", "sdpa")


def _model(kind="llama", **changes):
    attention.register()
    return lively(tiny(kind, **{"max_position_embeddings": 256} | changes))


def _gradients(lm, loss):
    names, parameters = zip(*lm.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("tied", [True, False])
def test_values_and_gradients_do_not_depend_on_packing(name, window, tied):
    kind = "llama" if window is None else "mistral"
    lm = _model(kind, tie_word_embeddings=tied, **({"sliding_window": window} if window else {}))
    for parameter in lm.parameters():
        parameter.data.mul_(0.5)  # tamer: gradients of 130 tokens compare in fp32
    rows = segments(LENGTHS, 64)
    mix = torch.randn(sum(LENGTHS) - len(LENGTHS), generator=torch.Generator().manual_seed(2))
    expected = one_by_one(lm, rows)
    wanted = _gradients(lm, (expected * mix).sum())
    lm.set_attn_implementation(attention.choose(name, CPU, lm.config, torch.float32))
    policy = Policy(lm, head_chunk_tokens=50)
    for packed in (True, False):
        logps = policy(batch(rows, packed=packed)).logps
        torch.testing.assert_close(logps, expected, rtol=0, atol=5e-5)
        for leaf, gradient in _gradients(lm, (logps * mix).sum()).items():
            off = (gradient - wanted[leaf]).norm() / wanted[leaf].norm()
            assert off < 2e-5, (leaf, packed, off)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_capped_scores_and_sinks_have_gradients_too(kind):
    lm = _model(kind)
    rows = segments((9, 30, 8), 64)
    expected = one_by_one(lm, rows)
    wanted = _gradients(lm, expected.sum())
    lm.set_attn_implementation(attention.choose("auto", CPU, lm.config, torch.float32))
    logps = Policy(lm, head_chunk_tokens=50)(batch(rows)).logps
    torch.testing.assert_close(logps, expected, rtol=0, atol=5e-5)
    for leaf, gradient in _gradients(lm, logps.sum()).items():
        assert (gradient - wanted[leaf]).norm() <= 2e-5 * wanted[leaf].norm() + 1e-6, leaf


@torch.no_grad()
def test_a_change_in_one_segment_reaches_no_other():
    """And none of the positions before it: bitwise, because nothing of another segment is ever read."""
    lm = _model()
    rows = segments((20, 25, 24), 64)
    lm.set_attn_implementation("sapwood")
    policy = Policy(lm, head_chunk_tokens=50)
    before = policy(batch(rows)).logps
    rows[1] = rows[1].clone()
    rows[1][10] = (rows[1][10] + 7) % 64
    after = policy(batch(rows)).logps
    changed = (before != after).nonzero()[:, 0]
    assert changed.min() == 19 + 9  # the target itself
    assert changed.max() <= 19 + 23
    assert len(changed) > 5


@torch.no_grad()
def test_bf16_stays_close_to_fp32():
    """Packed and alone differ by rounding only: bf16 keeps 8 bits, two layers, logits of size 3."""
    lm = _model(max_position_embeddings=512)
    for parameter in lm.parameters():
        parameter.data.mul_(0.3)
    rows = segments((300, 40, 350, 20), 64)
    exact = one_by_one(lm, rows)
    lm.bfloat16()
    for name in NAMES:
        lm.set_attn_implementation(attention.choose(name, CPU, lm.config, torch.bfloat16))
        logps = Policy(lm, head_chunk_tokens=50)(batch(rows)).logps
        assert (logps - exact).abs().mean() < 0.02, name


def test_nothing_grows_with_the_square_of_the_packed_row():
    """64 segments of 16 tokens: the largest tensor of both passes is far below T * T = 2^20 entries."""
    lm, largest = _model(max_position_embeddings=1024), Largest()
    for name in NAMES:
        lm.set_attn_implementation(attention.choose(name, CPU, lm.config, torch.float32))
        with largest:
            Policy(lm, head_chunk_tokens=50)(batch(segments((16,) * 64, 64))).logps.sum().backward()
    assert largest.entries <= 64 * 4 * 16 * 16 + 64 * 16 * 64  # scores of all segments, or hidden states


def test_dropout_in_attention_works_and_needs_no_state():
    lm = _model(attention_dropout=0.5).train()
    rows = segments((9, 6), 64)
    for name in NAMES:
        lm.set_attn_implementation(attention.choose(name, CPU, lm.config, torch.float32))
        policy = Policy(lm, head_chunk_tokens=50)
        torch.manual_seed(1)
        first = policy(batch(rows)).logps
        second = policy(batch(rows)).logps
        torch.manual_seed(1)
        assert torch.equal(policy(batch(rows)).logps, first)
        assert not torch.equal(first, second)


def test_plan_of_groups():
    """Segments 4, 1, 3, 4: the 3 joins the fours (3 >= 0.75 * 4), the 1 stands alone; 1 place is padding."""
    plan = attention.plan(batch(segments((4, 1, 3, 4), 64)))
    assert [(g.rows, g.length) for g in plan.groups] == [(3, 4), (1, 1)]
    assert plan.gather.tolist() == [8, 9, 10, 11, 0, 1, 2, 3, 5, 6, 7, 7, 4]
    assert plan.inverse.tolist() == [4, 5, 6, 7, 12, 8, 9, 10, 0, 1, 2, 3]
    in_order = attention.plan(batch(segments((5,), 64)))
    assert in_order.gather is None


def test_without_a_plan_a_model_is_refused():
    lm = _model()
    lm.set_attn_implementation("sapwood")
    with pytest.raises(ModelError, match="LlamaAttention does not hand its keywords on"):
        lm(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("flash", "llama", "model.attention=flash is unknown; type one of auto, eager"),
        ("flash_attention_2", "llama", "needs CUDA and precision=bf16, not cpu and float32"),
        ("varlen", "llama", "needs CUDA"),
        ("sdpa", "gemma2", "cannot do capped attention scores, which gemma2 has; type model.attention=auto"),
    ],
)
def test_names_that_cannot_be_had_are_refused(name, kind, words):
    with pytest.raises(ModelError, match=words):
        attention.choose(name, CPU, tiny(kind), torch.float32)


def test_auto_on_cuda_takes_what_is_exact_there(monkeypatch):
    cuda = torch.device("cuda")
    installed = set()
    monkeypatch.setattr(attention, "_flash_installed", lambda name: name in installed)

    def auto(kind="llama", dtype=torch.bfloat16, **changes):
        return attention.choose("auto", cuda, tiny(kind, **changes), dtype)

    assert auto() == "sapwood_varlen"
    assert auto(dtype=torch.float32) == "sapwood"
    assert auto(attention_dropout=0.1) == "sapwood"
    assert auto("gemma2") == "sapwood"
    assert auto("gpt_oss") == "sapwood"
    installed.add("flash_attention_2")
    assert auto() == auto("gemma2") == "flash_attention_2"
    assert auto("gpt_oss") == "sapwood"  # flash-attn 2 has no sinks
    installed.add("flash_attention_3")
    assert auto() == "flash_attention_3"
    assert auto(attention_dropout=0.1) == "flash_attention_2"  # flash-attn 3 has no dropout
