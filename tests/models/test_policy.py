"""What a policy answers on request: adapters off, sampling temperature, collisions."""

import pytest
import tiny
import torch
from rows import batch, segments
from transformers import AutoModelForCausalLM

from framework.batch import Distribution
from framework.models import adapters, load

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    return load.inspect(str(tiny.write(tmp_path_factory.mktemp("model"), tied=True)))


def _policy(description, adapter=None):
    """Filled as a strategy does it; adapters moved away from zero."""
    policy = load.builder(description, attention="sapwood", head_chunk_tokens=8, adapter=adapter)()
    parameters = dict(policy.named_parameters())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in load.reader(description, adapter=adapter)():
            moved = 0.1 * torch.randn(tensor.shape, generator=generator) if adapters.is_adapter(name) else 0
            parameters[name].copy_(tensor + moved)
    return policy.eval()


def test_without_the_adapter_the_frozen_model_answers(description):
    plain, adapted = _policy(description), _policy(description, LORA)
    rows = batch(segments((7, 3, 12), description.vocab_size))
    with torch.no_grad():
        before = adapted(rows).logps
        assert torch.equal(adapted(rows, adapter=False).logps, plain(rows).logps)
        assert not torch.allclose(before, plain(rows).logps, atol=1e-2)
        assert torch.equal(adapted(rows).logps, before)
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {
        n for n, _ in adapted.named_parameters() if ".lora_" in n
    }


def test_a_model_without_adapters_is_no_reference_of_itself(description):
    rows = batch(segments((7, 3), description.vocab_size))
    with pytest.raises(ValueError, match="has no adapter"):
        _policy(description)(rows, adapter=False)


@torch.no_grad()
def test_temperature_divides_the_logits_and_answers_follow_it(description):
    policy = _policy(description)
    (row,) = segments((9,), description.vocab_size)
    lm = AutoModelForCausalLM.from_pretrained(description.path)
    law = (lm(input_ids=row[None]).logits[0, :-1] / 0.7).log_softmax(-1)
    found = policy(batch([row]), needs=frozenset({"entropies", "mean_logps", "collisions"}), temperature=0.7)
    torch.testing.assert_close(found.logps, law.gather(1, row[1:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropies, -(law.exp() * law).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean_logps, law.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.collisions, law.exp().square().sum(1).log(), rtol=1e-5, atol=1e-5)
    assert found.values is None
    assert policy(batch([row])).collisions is None


@torch.no_grad()
def test_candidates_are_of_the_models_own_distribution(description):
    """The likeliest five of the first 300 tokens at temperature 2, then the same ones by their ids."""
    policy = _policy(description)
    (row,) = segments((9,), description.vocab_size)
    logits = AutoModelForCausalLM.from_pretrained(description.path)(input_ids=row[None]).logits[0, :-1]
    values, ids = (logits[:, :300] / 2.0).log_softmax(-1).topk(5)
    asked = Distribution(vocabulary=300, temperature=2.0, likeliest=5)
    found = policy(batch([row]), distribution=asked)
    assert torch.equal(found.candidate_ids, ids)
    torch.testing.assert_close(found.candidate_logps, values, rtol=1e-5, atol=1e-5)
    own = logits.log_softmax(-1).gather(1, row[1:, None])[:, 0]
    torch.testing.assert_close(found.logps, own, rtol=1e-5, atol=1e-5)
    again = policy(batch([row]), distribution=Distribution(vocabulary=300, temperature=2.0, ids=ids))
    assert torch.equal(again.candidate_logps, found.candidate_logps)
