"""Bodies with one number on top: what they answer, where their weights come from, who can load them."""

import json
import shutil

import pytest
import tiny
import torch
from rows import batch, segments
from safetensors.torch import load_file
from test_families import lively
from test_families import tiny as tiny_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from framework.errors import ModelError
from framework.models import adapters, attention, export, families, load
from framework.models.scorer import Scorer

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}
HEAD = "lm.score.weight"
attention.register()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def directory(request, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture
def description(directory):
    return load.inspect(str(directory), head="score")


def _filled(description, adapter=None, weights=None, dtype=torch.float32):
    scorer = load.builder(description, attention="sapwood", head_chunk_tokens=8, adapter=adapter)()
    parameters = dict(scorer.named_parameters())
    given = dict(weights or load.reader(description, adapter=adapter)())
    assert list(given) == list(parameters)  # each once, in the built model's order
    with torch.no_grad():
        for name, tensor in given.items():
            parameters[name].copy_(tensor)
    return load.cast(scorer, dtype).eval()


def _moved(description, adapter=None):
    """Weights as an engine yields them, with every trained value moved away from what was read."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in load.reader(description, adapter=adapter)():
        if adapter is None or adapters.is_adapter(name) or "score" in name:
            tensor = tensor.float() + 0.05 * torch.randn(tensor.shape, generator=generator)
        yield name, tensor


def _own(lm, rows):
    """transformers' scores at every token of each row but the last: [K] in the order of `batch`."""
    return torch.cat([lm.score(lm.model(input_ids=row[None]).last_hidden_state)[0, :-1, 0] for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "opt", "qwen3_moe", "phi3"])
def test_packed_and_padded_scores_are_those_of_the_family_itself(kind):
    config = tiny_config(kind)
    config.num_labels = 1
    families.check(config, head="score")
    lm = lively(config, auto=AutoModelForSequenceClassification)
    rows = segments((9, 1, 6, 9), 64)
    expected = torch.cat(
        [lm.score(lm.base_model(input_ids=row[None]).last_hidden_state)[0, :-1, 0] for row in rows]
    )
    lm.set_attn_implementation("sapwood")
    for packed in (True, False):
        found = Scorer(lm)(batch(rows, packed=packed)).scores
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert len(Scorer(lm).blocks()) == 2


@torch.no_grad()
def test_a_new_head_sits_on_the_body_of_the_language_model(directory, description):
    """N(0, 1 / (d + 1)) with d = 32: a standard deviation of 0.174, the same for the same seed."""
    policy = dict(load.reader(load.inspect(str(directory)))())
    given = dict(load.reader(description)())
    assert list(given)[-1] == HEAD
    assert all(torch.equal(tensor, policy[name]) for name, tensor in given.items() if name != HEAD)
    assert 0.1 < given[HEAD].std() < 0.25
    again, other = (dict(load.reader(description, seed=seed)())[HEAD] for seed in (0, 1))
    assert torch.equal(again, given[HEAD])
    assert not torch.equal(other, given[HEAD])
    assert not dict(load.reader(description, zero_head=True)())[HEAD].any()
    assert description.parameters == sum(tensor.numel() for tensor in given.values())
    rows = batch(segments((7, 3, 12), description.vocab_size))
    assert _filled(description)(rows).scores.std() > 0.1


@torch.no_grad()
def test_the_head_multiplies_in_fp32_also_in_a_bf16_run(description):
    """A bf16 product would have 8 bits: scores a power of two apart from 256 possible steps."""
    scorer = _filled(description, dtype=torch.bfloat16)
    scores = scorer(batch(segments((40, 60), description.vocab_size))).scores
    assert scores.dtype == torch.float32
    assert (scores.bfloat16().float() != scores).float().mean() > 0.9


def test_what_is_exported_scores_alike_in_transformers_and_here(description, tmp_path):
    """A batch of rows of unlike length that end with the end token, as a stranger would score answers."""
    export.export(tmp_path / "rm", description=description, weights=_moved(description))
    lm = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    words = AutoTokenizer.from_pretrained(tmp_path / "rm")
    texts = ["The capital<|im_end|>", "Hello! One two three four five<|im_end|>"]
    expected = []
    scorer = _filled(description, weights=_moved(description))
    for text in texts:
        ids = torch.tensor(words(text)["input_ids"])
        rows = batch([torch.cat([ids, ids[:1]])])  # trained positions end one token before the row
        expected.append(scorer(rows).scores[-1].item())
    with torch.no_grad():
        found = lm(**words(texts, padding=True, return_tensors="pt")).logits
    assert found.shape == (2, 1)
    assert found[:, 0].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)

    saved = load.inspect(str(tmp_path / "rm"), head="score")
    assert saved.scored
    again = dict(load.reader(saved, seed=7, zero_head=True)())
    assert all(torch.equal(again[name], tensor) for name, tensor in _moved(description))
    bare = dict(load.reader(saved, seed=7, zero_head=True, keep_head=False)())
    assert not bare.pop(HEAD).any()
    assert all(torch.equal(bare[name], again[name]) for name in bare)


def test_padding_is_never_a_token_that_ends_an_answer(directory, tmp_path):
    """Many chat models pad with their end token; transformers would score the token before it."""
    copied = shutil.copytree(directory, tmp_path / "model")
    file = copied / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<|im_end|>"}))
    description = load.inspect(str(copied), head="score")
    assert description.tokenizer.pad_token == description.tokenizer.eos_token
    export.export(tmp_path / "rm", description=description, weights=load.reader(description)())
    words = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert words.pad_token is None
    assert json.loads((tmp_path / "rm/config.json").read_text())["pad_token_id"] is None
    assert description.tokenizer.pad_token == "<|im_end|>"
    words.unk_token = "<|endoftext|>"
    assert export.padding(words) == "<|endoftext|>"


@torch.no_grad()
def test_adapters_on_the_body_train_with_the_head_and_are_merged_when_written(description, tmp_path):
    adapted = _filled(description, LORA)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if ".lora_" in name} | {
        "lm.base_model.model.score.weight"
    }
    rows = segments((7, 3, 12), description.vocab_size)
    torch.testing.assert_close(adapted(batch(rows)).scores, _filled(description)(batch(rows)).scores)
    given = dict(_moved(description, LORA))
    expected = _filled(description, LORA, given)(batch(rows)).scores
    export.export(tmp_path / "rm", description=description, weights=given.items(), adapter=LORA)
    lm = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    torch.testing.assert_close(_own(lm, rows), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in load_file(tmp_path / "rm/model.safetensors"))


def test_a_scorer_that_does_not_answer_alike_is_never_named(description, tmp_path, monkeypatch):
    write = export._write_model

    def spoil(lm, draft, description):
        lm.score.weight.data.mul_(1.01)
        write(lm, draft, description)

    monkeypatch.setattr(export, "_write_model", spoil)
    with pytest.raises(export.ExportError, match="the model answers otherwise"):
        export.export(tmp_path / "rm", description=description, weights=_moved(description))
    assert not list(tmp_path.iterdir())


def test_a_head_of_the_wrong_kind_is_refused(directory, description, tmp_path):
    export.export(tmp_path / "rm", description=description, weights=load.reader(description)())
    with pytest.raises(ModelError, match=r"holds a reward model .*expected a causal language model"):
        load.inspect(str(tmp_path / "rm"))
    file = tmp_path / "rm/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(ModelError, match="classifier with 2 labels; expected a reward model, which has 1"):
        load.inspect(str(tmp_path / "rm"), head="score")
    with pytest.raises(ModelError, match=r"granite cannot be a reward model .*Use one of .*llama"):
        families.check(tiny_config("granite"), head="score")
    assert description.fingerprint != load.inspect(str(directory)).fingerprint


def test_the_trial_compares_scores_too():
    config = tiny_config("llama")
    config.num_labels = 1
    lm = lively(config, auto=AutoModelForSequenceClassification)
    lm.set_attn_implementation("sapwood")
    families.prove(Scorer(lm), lm)
    other = lively(config, seed=1, auto=AutoModelForSequenceClassification)
    other.set_attn_implementation("sapwood")
    with pytest.raises(ModelError, match="a token from its own"):
        families.prove(Scorer(other), lm)
