"""Generation: a batch answers what each prompt alone is answered, and stops where it must."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from framework.rollout.base import Prompt
from framework.rollout.hf import end_tokens, generate
from framework.rollout.hf import shared as common

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in (
        "one",
        "the cat sat on the mat and looked at the dog",
        "a dog",
        "the cat sat",
        "one two three four",
    )
]


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    """A tiny model with weights large enough that it does not say the same token for ever."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model, AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def ending(loaded):
    """The same, where a token that greedy answers contain at different places ends them."""
    model, tokenizer = loaded
    before = model.generation_config.eos_token_id
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    places = {
        token: {a.ids.index(token) for a in answers if token in a.ids} for a in answers for token in a.ids
    }
    token = max(sorted(places), key=lambda t: (len(places[t]), sum(t not in a.ids for a in answers)))
    assert len(places[token]) > 1, "no token ends two answers at different places"
    model.generation_config.eos_token_id = [token]
    yield model, tokenizer, token
    model.generation_config.eos_token_id = before


def alone(model, tokenizer, prompt, most):
    """What transformers' own generate says to one prompt."""
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ends = sorted(end_tokens(model, tokenizer))
    out = model.generate(
        **inputs, max_new_tokens=most, do_sample=False, eos_token_id=ends, pad_token_id=ends[0]
    )
    return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_answers_equal_those_of_each_prompt_alone(ending, batch_size):
    """Left padding, the shared prefix and rows that leave early change no token."""
    model, tokenizer, _ = ending
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert [a.ids for a in answers] == [alone(model, tokenizer, p, 12) for p in PROMPTS]
    assert len({len(a.ids) for a in answers}) > 1


def test_an_answer_ends_with_its_end_token_or_is_not_finished(ending):
    model, tokenizer, end = ending
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    for answer in answers:
        assert end not in answer.ids[:-1]
        assert answer.finished == (answer.ids[-1] in end_tokens(model, tokenizer))
        assert answer.finished or len(answer.ids) == 12


def test_special_tokens_are_not_in_the_text(loaded):
    model, tokenizer = loaded
    ids = tokenizer.all_special_ids
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    for answer in answers:
        assert answer.text == tokenizer.decode([i for i in answer.ids if i not in ids])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_draw_depends_on_its_own_prompt_only(loaded, batch_size):
    model, tokenizer = loaded
    whole = generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=3)
    cut = generate(
        model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=3, batch_size=batch_size
    )
    assert [a.ids for a in cut] == [a.ids for a in whole]
    fewer = generate(model, tokenizer, PROMPTS[:2], max_new_tokens=8, temperature=1.0, seed=3)
    assert [a.ids for a in fewer] == [a.ids for a in whole[:2]]


def test_another_seed_draws_otherwise_and_the_same_prompt_twice_too(loaded):
    model, tokenizer = loaded
    twice = [PROMPTS[0], PROMPTS[0]]
    first = generate(model, tokenizer, twice, max_new_tokens=8, temperature=1.0, seed=3)
    other = generate(model, tokenizer, twice, max_new_tokens=8, temperature=1.0, seed=4)
    assert first[0].ids != first[1].ids
    assert first[0].ids != other[0].ids


def test_progress_counts_every_prompt_once(ending):
    model, tokenizer, _ = ending
    seen = []
    generate(
        model,
        tokenizer,
        PROMPTS,
        max_new_tokens=6,
        batch_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n, 5) for n in range(1, 6)]


def test_the_models_mode_is_left_as_it_was(loaded):
    model, tokenizer = loaded
    model.train()
    generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("ids", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2]], 1),  # the shorter one keeps a token of its own
        ([[5], [6, 7]], 0),
        ([[1, 2, 3]], 2),
    ],
)
def test_the_shared_prefix_leaves_each_prompt_a_token(ids, shared):
    assert len(common([Prompt(tuple(row), 0) for row in ids])) == shared
