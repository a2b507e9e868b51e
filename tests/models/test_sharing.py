"""A prompt that is stored once gives the answers, and the gradients, of one that is repeated for each."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
from test_attention import _gradients, _model

from framework.batch import Batch
from framework.data.shared import Tree, collate_answers, lay_out, learnt
from framework.models import attention, layout
from framework.models.policy import Policy

CPU = torch.device("cpu")
NAMES = ("auto", "eager", "sdpa", "varlen")
# (prompt, answers) in tokens; among them a pair, a ranking, one answer alone, and prompts of 1 and 100 tokens
TREES = ((30, (5, 12)), (1, (4, 1)), (100, (20, 3, 20)), (9, (6,)))
# every answer of a ranking is in several pairs
SEGMENTS = ((0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1), (2, 0), (2, 2), (2, 1), (2, 2), (3, 0))


def _trees():
    generator = np.random.default_rng(3)
    draw = lambda n: generator.integers(3, 64, n)  # noqa: E731
    return [Tree(draw(p), [draw(a) for a in answers]) for p, answers in TREES]


def _batch(trees, *, packing, sharing):
    """All answer tokens of SEGMENTS are trained."""
    found = lay_out(trees, SEGMENTS, packing=packing, sharing=sharing, pad_id=0)
    targets = [trees[t].answers[k] for t, k in SEGMENTS]
    fields = learnt(found, targets, [np.ones(len(ids), dtype=bool) for ids in targets], [0] * len(SEGMENTS))
    return Batch(**fields, units=1.0)


def _alone(lm, trees):
    """The model's own log-probabilities of every answer after its prompt, each alone: [K]."""
    answers = []
    for t, k in SEGMENTS:
        prompt, answer = trees[t].prompt, trees[t].answers[k]
        row = torch.from_numpy(np.concatenate([prompt, answer]))
        logits = lm(input_ids=row[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        answers.append(logits.log_softmax(-1).gather(1, torch.from_numpy(answer)[:, None])[:, 0])
    return torch.cat(answers)


def _varlen_on_cpu(query, key, value, starts, _, longest, __, *, scale, window_size, enable_gqa):
    """What torch's kernel for ragged rows computes, which needs CUDA: causal attention in each segment."""
    assert longest == starts.diff().max()
    outs = []
    for start, stop in itertools.pairwise(starts.tolist()):
        q, k, v = (tensor[start:stop].transpose(0, 1) for tensor in (query, key, value))
        behind = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [None, 16])
def test_sharing_changes_neither_values_nor_gradients(name, window, monkeypatch):
    """fp32, 2e-5 of a gradient's norm: shared, packed, padded, and every answer alone."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", _varlen_on_cpu)
    lm = _model("mistral" if window else "llama", **({"sliding_window": window} if window else {}))
    for parameter in lm.parameters():
        parameter.data.mul_(0.5)
    trees = _trees()
    expected = _alone(lm, trees)
    mix = torch.randn(len(expected), generator=torch.Generator().manual_seed(2))
    wanted = _gradients(lm, (expected * mix).sum())
    implementation = attention.OURS[name]
    assert attention.shares_prompts(implementation)
    lm.set_attn_implementation(implementation)
    policy = Policy(lm, head_chunk_tokens=50)
    for packing, sharing in ((True, True), (True, False), (False, False)):
        made = _batch(trees, packing=packing, sharing=sharing)
        assert (made.places is not None) == sharing
        logps = policy(made).logps
        torch.testing.assert_close(logps, expected, rtol=0, atol=5e-5)
        for leaf, gradient in _gradients(lm, (logps * mix).sum()).items():
            off = (gradient - wanted[leaf]).norm() / wanted[leaf].norm()
            assert off < 2e-5, (leaf, packing, sharing, off)


def test_a_shared_row_holds_every_token_once_and_every_answer_sees_its_prompt():
    """By hand: prompt 7 8 with answers 5 and 6 9; then prompt 3 with 4."""
    made = collate_answers([([7, 8], [[5], [6, 9]]), ([3], [[4]])])
    assert made.input_ids.tolist() == [[7, 8, 5, 6, 9, 3, 4]]
    assert made.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert made.places.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert made.boundaries.tolist() == [0, 3, 7, 9]
    assert made.trained.tolist() == [1, 1, 3, 5]  # 8 predicts 5 and 6
    assert made.targets.tolist() == [5, 6, 9, 4]
    assert made.segments.tolist() == [0, 1, 1, 2]
    assert (made.tokens, made.max_length, made.units) == (7, 4, 4.0)


def test_equal_segments_are_attended_to_once():
    """11 segments, of which 3 repeat an answer of the ranking."""
    made = _batch(_trees(), packing=True, sharing=True)
    planned = attention.plan(made)
    assert sum(group.rows for group in planned.groups) == len(set(SEGMENTS)) == 8
    flat = attention.plan(made, grouped=False)
    assert len(flat.boundaries) == 9
    assert len(flat.gather) == sum(p + a for p, answers in TREES for a in answers)


def test_gradients_of_copies_add_up():
    """Tokens 0 1 with rows [0], [0 1], [0 1 1 of padding]: 0 has three copies, 1 two; padding has none."""
    segments = layout.Segments(
        packed=True,
        boundaries=torch.tensor([0, 1]),
        max_length=3,
        gather=torch.tensor([0, 0, 1, 0, 1, 1]),
        inverse=torch.tensor([0, 2]),
        copies=((torch.tensor([0, 1]), torch.tensor([1, 4])), (torch.tensor([0]), torch.tensor([3]))),
    )
    tokens = torch.zeros(2, 1, requires_grad=True)
    rows = layout.into_rows(tokens, segments)
    grad = torch.tensor([1.0, 2, 4, 8, 16, 32])[:, None]
    (total,) = torch.autograd.grad(rows, tokens, grad)
    assert total[:, 0].tolist() == [1 + 2 + 8, 4 + 16]
    rows = torch.zeros(6, 1, requires_grad=True)
    (spread,) = torch.autograd.grad(layout.out_of_rows(rows, segments), rows, torch.tensor([[3.0], [5.0]]))
    assert spread[:, 0].tolist() == [3, 0, 5, 0, 0, 0]


def test_kernels_of_transformers_share_nothing():
    for name in attention.FLASH:
        assert not attention.shares_prompts(name)
        with pytest.raises(ValueError, match="shares_prompts"):
            attention.keywords(_batch(_trees(), packing=True, sharing=True), name)
        assert "cu_seq_lens_q" in attention.keywords(_batch(_trees(), packing=True, sharing=False), name)
