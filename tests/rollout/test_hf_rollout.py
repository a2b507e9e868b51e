"""The rollout's contract: a function of (weights, prompts, sampling) and of nothing else."""

import copy

import pytest
import torch
import workers
from transformers import AutoModelForCausalLM, AutoTokenizer

from framework.errors import ConfigError
from framework.models import adapters, load
from framework.rollout.base import Prompt, Sampling
from framework.rollout.hf import HfRollout, cut
from framework.strategy.world import connect

TEXTS = [
    "the cat sat on the mat",
    "the cat",
    "the cat sat on the mat and looked at the dog and the dog",
    "the dog",
    "the dog sat",
    "the a b c",
]
LORA = adapters.Lora(rank=4, alpha=8.0)
SAMPLED = Sampling(10, temperature=0.7, samples=3, seed=5)


def prompts(tokenizer):
    return [Prompt(tuple(tokenizer(text).input_ids), 10 + index) for index, text in enumerate(TEXTS)]


def shaken(path, seed):
    """The tiny model with weights large enough that answers differ, fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def rollout(path, *, world=None, batch_size=64, dtype=torch.float32, scaling=None):
    """A rollout whose own weights mean nothing yet."""
    world = world or connect("cpu", timeout_s=10)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return HfRollout(
        lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        tokenizer,
        world,
        batch_size=batch_size,
        dtype=dtype,
        lora_scaling=scaling,
    )


def policy_weights(model):
    return ((f"lm.{name}", parameter.detach()) for name, parameter in model.named_parameters())


@torch.no_grad()
def log_probabilities(model, prompt, answer, temperature):
    """Of `answer` after `prompt`, in fp64, by transformers' own forward pass."""
    exact = copy.deepcopy(model).double()
    ids = torch.tensor([[*prompt.ids, *answer.ids]])
    logits = exact(ids).logits[0, len(prompt.ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]


def assert_exact(model, asked, answers, temperature):
    for prompt, group in zip(asked, answers, strict=True):
        for answer in group:
            expected = log_probabilities(model, prompt, answer, temperature)
            torch.testing.assert_close(torch.tensor(answer.logps).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_greedy_samples_equal_generate_of_transformers(tiny_model_dir, batch_size):
    """Every prompt alone there, groups of three here; a batch smaller than a group cuts the group."""
    model, engine = shaken(tiny_model_dir, 1), rollout(tiny_model_dir, batch_size=batch_size)
    engine.update(policy_weights(model), version=1)
    asked = prompts(engine.tokenizer)
    answers = engine.generate(asked, Sampling(10, temperature=0.0, samples=3))
    end = engine.tokenizer.eos_token_id
    for prompt, group in zip(asked, answers, strict=True):
        said = model.generate(
            torch.tensor([prompt.ids]), max_new_tokens=10, do_sample=False, pad_token_id=end
        )
        assert [answer.ids for answer in group] == [tuple(said[0, len(prompt.ids) :].tolist())] * 3


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(10, temperature=0.0)])
def test_log_probabilities_are_exact_and_stay_so_after_an_update(tiny_model_dir, sampling):
    """All prompts begin alike, so a cache that outlived the first weights would show by whole nats."""
    engine = rollout(tiny_model_dir)
    asked = prompts(engine.tokenizer)
    seen = []
    for version in (1, 2):
        model = shaken(tiny_model_dir, version)
        engine.update(policy_weights(model), version=version)
        answers = engine.generate(asked, sampling)
        assert_exact(model, asked, answers, sampling.temperature or 1.0)
        assert {answer.version for group in answers for answer in group} == {version}
        seen.append([answer.ids for group in answers for answer in group])
    assert seen[0] != seen[1]


def test_filtered_sampling_keeps_the_log_probabilities_of_the_filtered_law(tiny_model_dir):
    """top_k = 5: whatever token came, the five likeliest share all probability."""
    model, engine = shaken(tiny_model_dir, 1), rollout(tiny_model_dir)
    engine.update(policy_weights(model), version=1)
    asked = prompts(engine.tokenizer)[:2]
    for prompt, group in zip(asked, engine.generate(asked, Sampling(6, top_k=5, samples=4)), strict=True):
        for answer in group:
            ids = torch.tensor([[*prompt.ids, *answer.ids]])
            logits = model(ids).logits[0, len(prompt.ids) - 1 : -1]
            kept = logits.topk(5).values.logsumexp(1)
            expected = logits.gather(1, torch.tensor(answer.ids)[:, None])[:, 0] - kept
            torch.testing.assert_close(torch.tensor(answer.logps), expected, atol=2e-5, rtol=0)


def test_an_answer_depends_on_its_key_alone(tiny_model_dir):
    """Other neighbours, other chunks, other order: the same answers by (seed, index, sample)."""
    model, engine = shaken(tiny_model_dir, 1), rollout(tiny_model_dir)
    engine.update(policy_weights(model), version=1)
    asked = prompts(engine.tokenizer)
    whole = [[a.ids for a in group] for group in engine.generate(asked, SAMPLED)]
    assert len({ids for group in whole for ids in group}) == 18
    engine.batch_size = 4
    assert [[a.ids for a in group] for group in engine.generate(asked[::-1], SAMPLED)] == whole[::-1]
    assert [[a.ids for a in group] for group in engine.generate(asked[2:3], SAMPLED)] == whole[2:3]


def test_lengths_and_ends(tiny_model_dir):
    """With an end token that comes often: answers stop at it, keep it, and the others are not finished."""
    model, engine = shaken(tiny_model_dir, 1), rollout(tiny_model_dir)
    engine.update(policy_weights(model), version=1)
    asked = prompts(engine.tokenizer)
    sampling = Sampling(24, temperature=0.7, samples=8, seed=1)
    free = [a.ids for group in engine.generate(asked, sampling) for a in group]
    ends = {ids[1] for ids in free}
    engine.lm.generation_config.eos_token_id = sorted(ends)
    answers = [a for group in engine.generate(asked, sampling) for a in group]
    ends |= {engine.tokenizer.eos_token_id}
    for answer, longer in zip(answers, free, strict=True):
        stop = next((t + 1 for t, token in enumerate(longer) if token in ends), 24)
        assert answer.ids == longer[:stop]
        assert answer.finished == (answer.ids[-1] in ends)
        assert len(answer.logps) == len(answer.ids)


def on_ranks(world, path, batch_size):
    torch.manual_seed(world.rank)
    engine = rollout(path, world=world, batch_size=batch_size)
    engine.update(policy_weights(shaken(path, 1)), version=3)
    return engine.generate(prompts(engine.tokenizer), SAMPLED)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_one_and_two_ranks_give_the_same_answers(tiny_model_dir, batch_size):
    """To the bit, log-probabilities included; with one chunk the second rank only listens."""
    alone = on_ranks(connect("cpu", timeout_s=10), tiny_model_dir, batch_size)
    first, second = workers.run(2, on_ranks, tiny_model_dir, batch_size)
    assert alone == first == second


def from_a_sharded_engine(world, path):
    """Prompts of very different lengths, ranks with different amounts of work, three updates."""
    import functools

    from framework.strategy.fsdp2 import Fsdp
    from framework.train.optim import adamw

    description = load.inspect(str(path))
    build = load.builder(description, attention="sapwood", head_chunk_tokens=8)
    optimizer = functools.partial(adamw, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    trainer = Fsdp(world, precision="fp32").train(build, load.reader(description), optimizer)
    engine = rollout(path, world=world, batch_size=2)
    ids = tuple(engine.tokenizer("the cat sat on the mat").input_ids)
    asked = [Prompt(ids[:1], 0), Prompt(ids * 9, 1), Prompt(ids, 2)]
    for version in range(3):
        engine.update(trainer.weights(), version=version)
        answers = engine.generate(asked, Sampling(4 + 10 * version, samples=2))
    plain = load.load(description)
    return answers, all(
        torch.equal(ours, theirs.float())
        for ours, theirs in zip(engine.lm.parameters(), plain.parameters(), strict=True)
    )


def test_unequal_lengths_under_fsdp_do_not_hang_and_weights_arrive_whole(tiny_model_dir):
    first, second = workers.run(2, from_a_sharded_engine, tiny_model_dir)
    assert first == second
    assert first[1]


def adapted(path, dtype=torch.float32):
    model = adapters.attach(shaken(path, 1).to(dtype), LORA)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapters.is_adapter(name):
                parameter.normal_(0, 0.2, generator=generator)
    return model


def test_a_hundred_adapter_updates_leave_the_trainers_weights_alone(tiny_model_dir):
    """Merged in place in bf16 and taken out again, weights drift by 8e-3 in a hundred times."""
    trainer = adapted(tiny_model_dir, torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in trainer.named_parameters()}
    engine = rollout(tiny_model_dir, dtype=torch.bfloat16, scaling=LORA.alpha / LORA.rank)
    engine.update(policy_weights(trainer), version=0)
    first = {name: parameter.clone() for name, parameter in engine.lm.named_parameters()}
    for version in range(1, 101):
        engine.update(policy_weights(trainer), version=version)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.named_parameters())
    assert all(torch.equal(parameter, first[name]) for name, parameter in engine.lm.named_parameters())
    for name, layer in trainer.named_modules():
        if hasattr(layer, "lora_A"):
            base, a, b = (
                w.weight.float() for w in (layer.base_layer, layer.lora_A.default, layer.lora_B.default)
            )
            held = engine.lm.get_parameter(name.removeprefix("base_model.model.") + ".weight")
            assert torch.equal(held, (base + 2.0 * (b @ a)).bfloat16())


def test_answers_with_adapters_are_those_of_the_adapted_model(tiny_model_dir):
    """Under the names of an actor-critic, whose critic is left out."""
    trainer = adapted(tiny_model_dir)
    engine = rollout(tiny_model_dir, scaling=2.0)
    named = [(f"policy.lm.{name}", p.detach()) for name, p in trainer.named_parameters()]
    engine.update(iter([("critic.head.weight", torch.zeros(1)), *named]), version=0)
    asked = prompts(engine.tokenizer)
    assert_exact(trainer, asked, engine.generate(asked, SAMPLED), 0.7)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_gpt2_keeps_its_weights_the_other_way_round():
    """Conv1D holds [in, out]; a square one would take B A unturned without complaint."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from framework.rollout.weights import fill

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)
    model = GPT2LMHeadModel(config).eval()
    trainer = adapters.attach(copy.deepcopy(model), LORA)
    with torch.no_grad():
        for name, parameter in trainer.named_parameters():
            if adapters.is_adapter(name):
                parameter.normal_()
    fill(model, policy_weights(trainer), lora_scaling=2.0)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, trainer.eval()(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w[1:], "lacks 1 parameters"),
        (lambda w: [*w, ("lm.model.extra", torch.zeros(1))], "model.extra is no parameter"),
        (
            lambda w: [*w, ("lm.a.lora_A.default.weight", torch.zeros(1))],
            "lacks parts of 1 adapters, such as that of a",
        ),
    ],
)
def test_an_update_that_does_not_fit_is_refused(tiny_model_dir, change, said):
    engine = rollout(tiny_model_dir)
    with pytest.raises(ValueError, match=said):
        engine.update(iter(change(list(policy_weights(engine.lm)))), version=0)


def test_prompts_that_leave_no_room_are_refused(tiny_model_dir):
    """512 positions."""
    engine = rollout(tiny_model_dir)
    engine.update(policy_weights(shaken(tiny_model_dir, 1)), version=0)
    with pytest.raises(ConfigError, match=r"max_new_tokens=12 or less"):
        engine.generate([Prompt((5,) * 500, 0)], Sampling(13))


def test_chunks_hold_whole_groups_of_similar_length():
    """Lengths 1 to 5, two samples, at most five answers: two prompts a chunk, the longest first."""
    asked = [Prompt((0,) * length, length) for length in (3, 1, 5, 2, 4)]
    chunks = cut(asked, 2, 5)
    assert [[asked[index].index for index, _ in chunk] for chunk in chunks] == [
        [5, 5],
        [4, 4, 3, 3],
        [2, 2, 1, 1],
    ]
    assert [sample for _, sample in chunks[1]] == [0, 1, 0, 1]
    assert [len(chunk) for chunk in cut(asked[:1], 7, 3)] == [2, 2, 3]
