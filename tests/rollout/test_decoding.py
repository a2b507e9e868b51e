"""Three levels of keys, one softmax: the same answers as a forward pass over the whole row, whatever the
family asks of attention."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from framework.errors import ModelError
from framework.rollout import decoding
from framework.rollout.base import Sampling
from framework.rollout.decoding import Decoder, Layout, prepare

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "gemma2": {"sliding_window": 4, "head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gpt_oss": {"sliding_window": 4, "head_dim": 8, **EXPERTS, "rope_parameters": ROPE},  # sinks
    "deepseek_v2": {"num_key_value_heads": 4, "first_k_dense_replace": 2, **LATENT},  # caches less
    "diffllama": {},  # makes other values of what it caches
    "cohere": {"logit_scale": 0.5},  # scales its logits
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # learned positions
}  # fmt: skip
SHARED = (3, 4, 5)
PROMPTS = [(*SHARED, *own) for own in ((6, 7, 8, 9, 10, 11, 12), (9,), (20, 21, 22, 23))]
STEPS = 9


def lively(kind):
    given = {**SIZES, **HEADS, **ENDS, **KINDS[kind]}
    if kind == "gpt2":
        given = {"vocab_size": 64, **ENDS, **KINDS[kind]}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**given)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return lm


@torch.no_grad()
def by_whole_rows(lm, prompt):
    """(ids, log-probabilities) of the greedy answer, reading the whole row again for every token."""
    row, nats = list(prompt), []
    for _ in range(STEPS):
        logps = lm(torch.tensor([row]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        row.append(int(logps.argmax()))
        nats.append(float(logps.max()))
    return row[len(prompt) :], nats


def numbers(rows):
    return torch.zeros(rows, STEPS, dtype=torch.float64)


@torch.no_grad()
def decoded(lm, ends=(63,), shared=SHARED, width=2):
    prepare(lm)
    return Decoder(lm, ends, Sampling(STEPS, temperature=0.0), shared).run(PROMPTS, numbers(3 * width))


@pytest.mark.parametrize("shared", [SHARED, ()])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_every_kind_of_attention(kind, shared):
    lm = lively(kind)
    expected = [by_whole_rows(lm, prompt) for prompt in PROMPTS for _ in range(2)]
    for answer, (ids, nats) in zip(decoded(lm, shared=shared), expected, strict=True):
        assert answer.ids == ids[: len(answer.ids)]
        assert answer.logps == pytest.approx(nats[: len(answer.ids)], abs=3e-5)


def test_rows_that_leave_take_nothing_with_them(monkeypatch):
    """An end token that the three answers reach at different steps; rows leave at once."""
    lm = lively("llama")
    expected = [by_whole_rows(lm, prompt)[0] for prompt in PROMPTS]
    monkeypatch.setattr(decoding, "KEEP", 0.99)
    monkeypatch.setattr(decoding, "ROOM", 2)  # the caches grow on the way
    end = next(
        token
        for token in range(64)
        if len({ids.index(token) if token in ids else -1 for ids in expected}) > 1
    )
    for width in (1, 3):
        answers = decoded(lm, ends=[end], width=width)
        for answer, ids in zip(answers, [ids for ids in expected for _ in range(width)], strict=True):
            stop = ids.index(end) + 1 if end in ids else STEPS
            assert (answer.ids, answer.finished) == (ids[:stop], end in ids)


def test_long_prompts_are_read_in_blocks(monkeypatch):
    lm = lively("gemma2")
    whole = decoded(lm)
    monkeypatch.setattr(decoding, "SCORES", 1)
    blocks = decoded(lm)
    assert [answer.ids for answer in blocks] == [answer.ids for answer in whole]


def test_a_layout_folds_answers_to_one_prompt_and_back():
    """Prompts with 2, 0 and 3 answers left: a rectangle of 3 by 3 in which four places are empty."""
    layout = Layout.of(torch.tensor([0, 0, 2, 2, 2]), 3)
    assert layout.place.tolist() == [0, 1, 6, 7, 8]
    rows = torch.arange(5 * 2 * 2 * 1.0).view(5, 2, 2, 1)
    folded = layout.fold(rows)
    assert folded.shape == (3, 2, 6, 1)
    assert folded[2, 0, :, 0].tolist() == rows[2:, 0, :, 0].flatten().tolist()
    assert torch.equal(layout.unfold(folded), rows)


def test_attention_that_is_told_nothing_is_refused():
    lm = lively("llama")
    prepare(lm)
    with pytest.raises(ModelError, match="cannot be rolled out"):
        lm(torch.tensor([[1, 2]]))
