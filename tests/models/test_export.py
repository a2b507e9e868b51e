"""What is exported is loaded again by transformers and peft alone, and must be the trained weights."""

import pytest
import tiny
import torch
from rows import one_by_one, segments
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from framework.errors import ConfigError
from framework.models import adapters, export, load

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def description(request, tmp_path_factory):
    return load.inspect(str(tiny.write(tmp_path_factory.mktemp("model"), tied=request.param)))


def _trained(description, adapter=None, seed=5):
    """Weights as an engine yields them: what was read, with every trained value moved away."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in load.reader(description, adapter=adapter)():
        if adapter is None or adapters.is_adapter(name):
            tensor = tensor.float() + 0.05 * torch.randn(tensor.shape, generator=generator)
        yield name, tensor


@torch.no_grad()
def test_a_whole_model_is_what_transformers_loads(description, tmp_path):
    out = tmp_path / "model"
    export.export(out, description=description, weights=_trained(description))
    lm = AutoModelForCausalLM.from_pretrained(out)
    assert lm.dtype == torch.float32
    kept = dict(lm.named_parameters())
    for name, tensor in _trained(description):
        assert torch.equal(kept[name.removeprefix("lm.")], tensor)
    words = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "Hello!"}]
    assert words.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nHello!<|im_end|>\n"
    assert lm.generation_config.eos_token_id == description.tokenizer.eos_token_id
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_another_type_is_rounded_once(description, tmp_path):
    export.export(tmp_path / "m", description=description, weights=_trained(description), dtype="bf16")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in _trained(description):
        assert torch.equal(stored[name.removeprefix("lm.")], tensor.bfloat16())


@torch.no_grad()
def test_an_adapter_is_what_peft_loads(description, tmp_path):
    from peft import PeftModel

    export.export(tmp_path / "a", description=description, weights=_trained(description, LORA), adapter=LORA)
    assert not list((tmp_path / "a").glob("model*"))
    base = AutoModelForCausalLM.from_pretrained(description.path)
    lm = PeftModel.from_pretrained(base, tmp_path / "a")
    kept = dict(lm.named_parameters())
    count = 0
    for name, tensor in _trained(description, LORA):
        if adapters.is_adapter(name):
            assert torch.equal(kept[name.removeprefix("lm.")], tensor)
            count += 1
    assert count == 42


def test_an_adapter_trained_against_a_rounded_base_is_right_too(description, tmp_path):
    """In bf16 the engine's frozen weights are rounded ones of the fp32 base: no fault of the adapter's."""
    given = [
        (name, tensor if adapters.is_adapter(name) else tensor.bfloat16())
        for name, tensor in _trained(description, LORA)
    ]
    export.export(tmp_path / "a", description=description, weights=given, adapter=LORA)
    given = [(name, tensor * 1.5 if "up_proj.base" in name else tensor) for name, tensor in given]
    with pytest.raises(export.ExportError, match="the adapter answers otherwise"):
        export.export(tmp_path / "b", description=description, weights=given, adapter=LORA)


@torch.no_grad()
def test_a_merged_model_answers_as_base_and_adapter(description, tmp_path):
    """W + (alpha / rank) B A = W + 2 B A, added in fp32."""
    given = dict(_trained(description, LORA))
    export.export(tmp_path / "m", description=description, weights=given.items(), adapter=LORA, merge=True)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    stem = "lm.base_model.model.model.layers.2.self_attn.v_proj"
    update = given[f"{stem}.lora_B.default.weight"] @ given[f"{stem}.lora_A.default.weight"]
    expected = given[f"{stem}.base_layer.weight"] + 2 * update
    torch.testing.assert_close(stored["model.layers.2.self_attn.v_proj.weight"], expected)
    assert not any("lora" in name for name in stored)
    export.export(tmp_path / "a", description=description, weights=given.items(), adapter=LORA)
    base = AutoModelForCausalLM.from_pretrained(description.path)
    adapted = adapters.reload(base, tmp_path / "a").eval()
    rows = segments((9, 5), description.vocab_size)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(one_by_one(merged, rows), one_by_one(adapted, rows), rtol=1e-4, atol=1e-4)


DORA = {**LORA, "kind": "dora"}


@torch.no_grad()
def test_dora_begins_as_the_model_and_is_merged_row_by_row(description, tmp_path):
    """m (W + 2 B A) / |W + 2 B A|, lengths by row; with B = 0 and m = |W| that is W."""
    plain = dict(load.reader(description)())
    start = load.reader(description, adapter=DORA)()
    export.export(tmp_path / "start", description=description, weights=start, adapter=DORA, merge=True)
    for name, stored in load_file(tmp_path / "start" / "model.safetensors").items():
        torch.testing.assert_close(stored, plain[f"lm.{name}"], rtol=1e-5, atol=1e-6)
    given = dict(_trained(description, DORA))
    export.export(tmp_path / "m", description=description, weights=given.items(), adapter=DORA, merge=True)
    stem = "lm.base_model.model.model.layers.2.self_attn.v_proj"
    update = given[f"{stem}.lora_B.default.weight"] @ given[f"{stem}.lora_A.default.weight"]
    moved = given[f"{stem}.base_layer.weight"] + 2 * update
    length = given[f"{stem}.lora_magnitude_vector.default.weight"]
    expected = length[:, None] * moved / moved.norm(dim=1, keepdim=True)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    torch.testing.assert_close(stored["model.layers.2.self_attn.v_proj.weight"], expected)


@torch.no_grad()
def test_dora_is_what_peft_loads(description, tmp_path):
    from peft import PeftModel

    export.export(tmp_path / "a", description=description, weights=_trained(description, DORA), adapter=DORA)
    lm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(description.path), tmp_path / "a")
    kept = dict(lm.named_parameters())
    given = {n: t for n, t in _trained(description, DORA) if adapters.is_adapter(n)}
    assert sum("magnitude" in name for name in given) == 21
    for name, tensor in given.items():
        assert torch.equal(kept[name.removeprefix("lm.")], tensor)


def test_a_directory_that_does_not_answer_alike_is_never_named(description, tmp_path, monkeypatch):
    """One matrix is spoilt on its way to the disk: nothing appears, and what was there stays."""
    out = tmp_path / "model"
    export.export(out, description=description, weights=_trained(description))
    before = (out / "model.safetensors").read_bytes()
    write = export._write_model

    def spoil(lm, draft, description):
        write(lm, draft, description)
        file = draft / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5)
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(export, "_write_model", spoil)
    with pytest.raises(export.ExportError, match="model was not written: the model answers otherwise"):
        export.export(out, description=description, weights=_trained(description, seed=6))
    assert (out / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_other_ranks_go_through_every_tensor_and_write_nothing(description, tmp_path):
    seen = []

    def weights():
        for name, tensor in _trained(description):
            seen.append(name)
            yield name, tensor

    export.export(tmp_path / "m", description=description, weights=weights(), rank=1)
    assert len(seen) == len(list(_trained(description)))
    assert not (tmp_path / "m").exists()


def test_tensors_that_are_missing_or_unknown_are_our_mistake(description, tmp_path):
    given = list(_trained(description))
    with pytest.raises(ValueError, match="1 parameters were not handed in"):
        export.export(tmp_path / "m", description=description, weights=given[1:])
    with pytest.raises(ValueError, match="came twice"):
        export.export(tmp_path / "m", description=description, weights=[*given, given[0]])


def test_refusals_come_before_any_tensor(description, tmp_path):
    def never():
        raise AssertionError("a tensor was asked for")
        yield

    with pytest.raises(ConfigError, match="nothing to merge"):
        export.export(tmp_path / "m", description=description, weights=never(), merge=True)
    with pytest.raises(ConfigError, match="dtype int8 is unknown; type one of fp32"):
        export.export(tmp_path / "m", description=description, weights=never(), dtype="int8")
