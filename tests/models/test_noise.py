"""Noise on embeddings: bounded by each segment's own length, and only while training."""

import torch
from rows import batch, segments
from transformers import LlamaConfig, LlamaForCausalLM

from framework.models import attention
from framework.models.noise import lengths, noisy
from framework.models.policy import Policy

ALPHA, WIDTH = 5.0, 16


def model():
    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        attn_implementation=attention.OURS["auto"],
    )
    return LlamaForCausalLM(config)


def test_each_segment_is_bounded_by_its_own_length():
    """5 / sqrt(4 * 16) = 0.625 for 4 tokens, 5 / sqrt(25 * 16) = 0.25 for 25, packed and padded alike."""
    lm = model()
    for packed in (True, False):
        rows = batch(segments((4, 25), 64), packed=packed)
        clean = lm.get_input_embeddings()(rows.input_ids)
        torch.manual_seed(1)
        with noisy(lm, rows, ALPHA):
            noise = (lm.get_input_embeddings()(rows.input_ids) - clean).detach()
        parts = [noise[0, :4], noise[0, 4:]] if packed else [noise[0, :4], noise[1]]
        for part, bound in zip(parts, (0.625, 0.25), strict=True):
            assert 0.9 * bound < part.abs().max() <= bound
            assert abs(float(part.mean())) < 0.15 * bound
        assert torch.equal(lm.get_input_embeddings()(rows.input_ids), clean)
        assert set(lengths(rows).flatten().tolist()) == {4.0, 25.0}


def test_only_training_is_noisy_and_seeds_repeat_it():
    policy = Policy(model(), head_chunk_tokens=8, neftune_alpha=ALPHA)
    plain = Policy(model(), head_chunk_tokens=8)
    rows = batch(segments((6, 9), 64))

    def drawn(seed):
        torch.manual_seed(seed)
        return policy.train()(rows).logps.detach()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(policy.eval()(rows).logps, plain(rows).logps)
