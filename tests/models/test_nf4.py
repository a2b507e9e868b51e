"""Weights in four bits against NF4 written out by hand, and everything that is done with them."""

from functools import partial

import pytest
import tiny
import torch
import workers
from safetensors.torch import load_file
from test_families import lively
from test_families import tiny as family
from transformers import AutoModelForCausalLM

from framework.errors import ModelError
from framework.models import adapters, export, load, nf4
from framework.train.optim import adamw

# Dettmers et al. 2023, appendix E, to seven digits.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0),
    ]
)
QLORA = {"rank": 4, "alpha": 8.0, "kind": "qlora"}
DOUBLE = {**QLORA, "double_quantisation": True}
LORA = {**QLORA, "kind": "lora"}


def weight(rows=6, width=192, seed=0, dtype=torch.float32):
    """Rows of unlike lengths, as no two rows of a model are alike."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(rows, 1, generator=generator) + 0.1
    return (lengths * torch.randn(rows, width, generator=generator)).to(dtype)


def by_hand(given):
    """Of each element the nearest of 16 levels, times the largest magnitude of its block of 64."""
    answer = torch.empty_like(given, dtype=torch.float32)
    for row in range(given.shape[0]):
        for start in range(0, given.shape[1], 64):
            block = given[row, start : start + 64].float()
            scale = block.abs().max()
            nearest = (block[:, None] / scale - LEVELS).abs().argmin(1)
            answer[row, start : start + 64] = LEVELS[nearest] * scale
    return answer


def test_four_numbers_by_hand():
    """Scale 2: 2, -1, 0.16, 0 are 1, -0.5, 0.08, 0 of it: nearest levels 15, 2, 8, 7; -0.525 * 2 = -1.05."""
    given = torch.zeros(1, 64)
    given[0, :4] = torch.tensor([2.0, -1.0, 0.16, 0.0])
    kept = nf4.quantised(given, double=False)
    assert kept["codes"][0, :3].tolist() == [15 * 16 + 2, 8 * 16 + 7, 7 * 16 + 7]
    assert kept["scales"].view(torch.float32).tolist() == [[2.0]]
    expected = torch.tensor([2.0, -1.0501461, 0.1591606, 0.0])
    torch.testing.assert_close(nf4.dequantised(kept, torch.float32)[0, :4], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [64, 192, 32, 72, 200])  # whole blocks, and rows that end inside of one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_element_is_the_nearest_level_of_its_block(width, dtype, monkeypatch):
    monkeypatch.setattr(nf4, "AT_ONCE", 2 * width)  # so that three parts are put together
    given = weight(width=width, dtype=dtype)
    kept = nf4.quantised(given, double=False)
    found = nf4.dequantised(kept, torch.float32)
    torch.testing.assert_close(found, by_hand(given), rtol=1e-6, atol=0)
    assert torch.equal(nf4.dequantised(kept, torch.bfloat16), found.bfloat16())
    assert {name: (tuple(t.shape), t.dtype) for name, t in kept.items()} == nf4.shapes(
        given.shape, double=False
    )


def test_scales_are_quantised_around_their_mean():
    """700 scales in groups of 256: off by half of a 127th of their group's largest distance at most."""
    given = weight(rows=100, width=448)
    once, twice = (nf4.quantised(given, double=double) for double in (False, True))
    assert torch.equal(once["codes"], twice["codes"])
    scales, found = nf4._scales(once).flatten(), nf4._scales(twice).flatten()
    for group in range(3):
        here = slice(256 * group, 256 * (group + 1))
        limit = (scales[here] - scales.mean()).abs().max() / 127 / 2
        assert 0.2 * limit < (found[here] - scales[here]).abs().max() < 1.001 * limit
    assert {name: (tuple(t.shape), t.dtype) for name, t in twice.items()} == nf4.shapes(
        given.shape, double=True
    )


def test_zeros_stay_zeros():
    for double in (False, True):
        kept = nf4.quantised(torch.zeros(2, 64), double=double)
        assert torch.equal(nf4.dequantised(kept, torch.float32), torch.zeros(2, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_keeps_the_same_bits(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    given = weight(rows=64, width=1024, dtype=dtype)
    codes, state = functional.quantize_4bit(given, blocksize=64, quant_type="nf4", compress_statistics=False)
    kept = nf4.quantised(given, double=False)
    assert torch.equal(codes.flatten(), kept["codes"].flatten())
    assert torch.equal(state.absmax, nf4._scales(kept).flatten())
    for kind in (torch.float32, torch.bfloat16):
        brought_back = nf4.by_kernel(kept["codes"], nf4._scales(kept), kind)
        assert torch.equal(brought_back, nf4.dequantised(kept, kind))


def test_a_product_keeps_no_weight_for_its_gradient():
    """y = x W^T + b and dx = dy W, of which 0.5625 bytes an element of W are kept, and no x."""
    linear = torch.nn.Linear(128, 48).requires_grad_(False)
    kept = nf4.quantised(linear.weight, double=False)
    layer = nf4.Nf4Linear(linear, double=False)
    for name, tensor in kept.items():
        getattr(layer, name).copy_(tensor)
    x = torch.randn(5, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert sum(t.nbytes for t in saved) == 0.5625 * 48 * 128
    plain = nf4.dequantised(kept, torch.float32)
    torch.testing.assert_close(y, x @ plain.T + linear.bias)
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(found, torch.ones_like(y) @ plain)


# ----- models


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    return load.inspect(str(tiny.write(tmp_path_factory.mktemp("model"), tied=True)))


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    """Rows of whole blocks: hidden 64, inner 192."""
    place = tiny.write(tmp_path_factory.mktemp("wide"), tied=False)
    lm = AutoModelForCausalLM.from_pretrained(place)
    lm.config.hidden_size, lm.config.intermediate_size, lm.config.head_dim = 64, 192, 16
    AutoModelForCausalLM.from_config(lm.config).save_pretrained(place)
    return place


def built(path, adapter):
    description = load.inspect(str(path))
    build = load.builder(description, attention="sapwood", head_chunk_tokens=8, adapter=adapter)
    return build, load.reader(description, adapter=adapter)


def held(world, path, adapter, name):
    """(bytes held for weights of the blocks, bytes of the rest that is frozen) on this rank."""
    from framework.strategy.ddp import Ddp
    from framework.strategy.fsdp2 import Fsdp

    kind = {"ddp": Ddp, "fsdp": Fsdp}[name]
    optimizer = partial(adamw, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    engine = kind(world, precision="bf16").train(*built(path, adapter), optimizer)
    assert not any("codes" in each or "scales" in each for each in engine.state_dict().shards)
    inside = outside = 0
    for each, parameter in engine._module.named_parameters():
        if not parameter.requires_grad:
            local = parameter.to_local() if name == "fsdp" else parameter
            packed = each.endswith(("_proj.base_layer.codes", ".scales", ".groups"))
            inside += local.nbytes if packed else 0
            outside += 0 if packed else local.nbytes
    return inside, outside


@pytest.mark.parametrize(("adapter", "share"), [(QLORA, 0.5625), (DOUBLE, 0.516)])
@pytest.mark.parametrize(("name", "size"), [("ddp", 1), ("fsdp", 2)])
def test_what_the_frozen_blocks_take(adapter, share, name, size, wide_dir):
    """0.5 + 4 / 64 bytes an element, or 0.5 + 1 / 64 and a little; shards add up to the whole.

    3 layers of q, o [64, 64], k, v [32, 64] and three of [192, 64]: 147456 elements.
    """
    ranks = workers.run(size, held, wide_dir, adapter, name)
    assert sum(inside for inside, _ in ranks) / 147456 == pytest.approx(share, rel=3e-3)
    rest = 2 * (2 * 400 * 64 + 7 * 64)  # embedding, head and norms in bf16
    assert sum(outside for _, outside in ranks) == rest


def test_only_linear_layers_of_blocks_are_quantised(description):
    policy = load.builder(description, attention="sapwood", head_chunk_tokens=8, adapter=QLORA)()
    kinds = {name: type(m).__name__ for name, m in policy.named_modules()}
    quantised = [name for name, kind in kinds.items() if kind == "Nf4Linear"]
    assert len(quantised) == 3 * 7
    assert all(name.endswith("_proj.base_layer") for name in quantised)
    some = {**QLORA, "targets": ["q_proj"]}
    policy = load.builder(description, attention="sapwood", head_chunk_tokens=8, adapter=some)()
    assert sum(isinstance(m, nf4.Nf4Linear) for m in policy.modules()) == 3 * 7
    assert sum(name.endswith("q_proj.base_layer.codes") for name, _ in policy.named_parameters()) == 3


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "qwen3_moe"])
def test_matrices_that_are_no_linear_layers_are_refused(kind):
    with pytest.raises(ModelError, match=f"a model of type {kind} in four bits.*type adapter=lora"):
        nf4.check(lively(family(kind)), kind)


def trained(description, adapter, seed=5):
    """Weights as an engine yields them, with adapters moved away from where they begin."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in load.reader(description, adapter=adapter)():
        if adapters.is_adapter(name):
            tensor = tensor.float() + 0.05 * torch.randn(tensor.shape, generator=generator)
        yield name, tensor


@pytest.mark.parametrize("adapter", [QLORA, DOUBLE, {**QLORA, "targets": ["q_proj"]}])
def test_unpacked_weights_are_named_as_those_of_lora(adapter, description):
    plain = {**adapter, "kind": "lora"}
    expected = dict(trained(description, plain))
    found = dict(nf4.unpacked(trained(description, adapter)))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.endswith("_proj.base_layer.weight") and not name.endswith("_proj.weight"):
            assert torch.equal(found[name], tensor)
        elif "double_quantisation" not in adapter:
            torch.testing.assert_close(found[name], by_hand(tensor), rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_merge_adds_to_what_four_bits_leave_in_fp32(description, tmp_path):
    """W + (alpha / rank) B A = W + 2 B A, where W is the weight brought back."""
    given = dict(trained(description, QLORA))
    export.export(tmp_path / "m", description=description, weights=given.items(), adapter=QLORA, merge=True)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    stem = "lm.base_model.model.model.layers.2.self_attn.v_proj"
    update = given[f"{stem}.lora_B.default.weight"] @ given[f"{stem}.lora_A.default.weight"]
    kept = {part: given[f"{stem}.base_layer.{part}"] for part in ("codes", "scales")}
    expected = nf4.dequantised(kept, torch.float32) + 2 * update
    torch.testing.assert_close(stored["model.layers.2.self_attn.v_proj.weight"], expected)
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@torch.no_grad()
def test_an_adapter_is_plain_lora_for_peft(description, tmp_path):
    """Over the plain base, and byte for byte the file of a LoRA run with the same adapter."""
    from peft import PeftModel

    for name, adapter in (("q", QLORA), ("l", LORA)):
        given = trained(description, adapter)
        export.export(tmp_path / name, description=description, weights=given, adapter=adapter)
    files = [tmp_path / name / "adapter_model.safetensors" for name in "ql"]
    assert files[0].read_bytes() == files[1].read_bytes()
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in "ql"]
    assert configs[0] == configs[1]
    lm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(description.path), tmp_path / "q")
    kept = dict(lm.named_parameters())
    for name, tensor in trained(description, QLORA):
        if adapters.is_adapter(name):
            assert torch.equal(kept[name.removeprefix("lm.")], tensor)


def test_an_adapter_of_another_base_is_not_written(description, tmp_path):
    """The proof is over the base in four bits: a changed scale shows."""
    given = [
        (n, (t.view(torch.float32) * 1.5).view(torch.int32) if "up_proj.base_layer.scales" in n else t)
        for n, t in trained(description, QLORA)
    ]
    with pytest.raises(export.ExportError, match="the adapter answers otherwise"):
        export.export(tmp_path / "a", description=description, weights=given, adapter=QLORA)
