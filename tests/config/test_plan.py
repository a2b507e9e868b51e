"""Plans against what really is held, tensor by tensor, and the command that shows them."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import workers
from rows import batch, segments
from transformers import AutoModelForCausalLM, LlamaConfig

from framework.batch import Distribution
from framework.config import changes, dry_run, fitting, plan
from framework.config.compose import compose
from framework.config.outlines import outlined
from framework.models import adapters, attention, planned
from framework.models.adapters import Lora
from framework.models.policy import Policy
from framework.stages.distill import Teacher
from framework.strategy import footprint
from framework.strategy.ddp import Ddp
from framework.strategy.fsdp2 import Fsdp
from framework.strategy.memory import Blocks
from framework.strategy.world import connect
from framework.train.optim import adamw

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LENGTHS = [300] * 4  # long enough for fused attention in fp32


def built(name="sapwood_fused", lora=None, config=CONFIG):
    attention.register()
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**config), attn_implementation=name)
    return Policy(adapters.attach(lm, lora) if lora else lm, head_chunk_tokens=64)


def values(lora=None):
    return ((name, p.detach()) for name, p in built(lora=lora).named_parameters())


def held(world, strategy, precision, lora):
    """(bytes of weights, masters, gradients, moments that an engine has after a step, what was planned)."""
    optimizer = partial(adamw, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    build = partial(built, lora=lora)
    engine = strategy(world, precision).train(build, partial(values, lora), optimizer)
    with engine.micro(last=True):
        engine.backward(-engine(batch(segments(LENGTHS, 400))).logps.sum())
    if isinstance(strategy(world), Ddp):
        kept = [engine._buckets._flats]
    else:
        kept = [[p.grad.to_local() for p in engine._parameters.values() if p.grad is not None]]
    gradients = bytes_of(*kept)
    engine.step(lr=1e-3, max_grad_norm=1.0)
    optimizer = engine._optimizer
    moments = [v for s in optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg")]
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [p.to_local() if hasattr(p, "to_local") else p for p in engine._module.parameters()]
    sizes = plan._sizes(dry_run.structure(build, footprint_dtype(precision)), precision)
    how = {} if isinstance(strategy(world), Ddp) else {"kept": False, "several": False, "cpu": True}
    name = "ddp" if isinstance(strategy(world), Ddp) else "fsdp"
    planned_ = footprint.trained(name, sizes, world.size, **how)
    return bytes_of(weights, masters, moments) + gradients, planned_.resident


def footprint_dtype(precision):
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def bytes_of(*lists):
    """Of the storages, each once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for each in lists for t in each}
    return sum(found.values())


@pytest.mark.parametrize("lora", [None, Lora(4, 8)], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_replicated_engine_holds(precision, lora):
    real, foreseen = held(connect("cpu", timeout_s=60), Ddp, precision, lora)
    assert real == foreseen


@pytest.mark.parametrize("lora", [None, Lora(4, 8)], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_sharded_engine_holds(precision, lora):
    """Every parameter has an even number of rows here, so both ranks hold a half of each."""
    for real, foreseen in workers.run(2, held, Fsdp, precision, lora):
        assert real == pytest.approx(foreseen, rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("lora", [None, Lora(4, 8)], ids=["full", "lora"])
def test_a_micro_batch_without_memory_needs_what_a_real_one_does(checkpointing, lora):
    """On the CPU and with values: packed rows through the real attention."""
    planned.register()
    how = Blocks(checkpointing)
    dry = dry_run.rehearse(
        dry_run.structure(partial(built, planned.COPYING, lora), torch.float32), how, dry_run.rows(1200, 300)
    )
    real = dry_run.rehearse(built(lora=lora), how, batch(segments(LENGTHS, 400)))
    assert dry.kept == pytest.approx(real.kept, rel=0.05)
    assert dry.peak == pytest.approx(real.peak, rel=0.05)


def working(how, tokens=1200):
    planned.register()
    return dry_run.rehearse(
        dry_run.structure(partial(built, planned.NAME), torch.bfloat16), how, dry_run.rows(tokens, 300)
    )


def test_checkpointing_halves_and_tokens_count():
    none, some, full = (working(Blocks(kind)) for kind in ("none", "selective", "full"))
    assert none.kept > some.kept > full.kept
    ends = working(Blocks("full")).kept - 4 * 1200 * 64 * 2  # what is kept outside of the blocks
    assert some.kept - ends == pytest.approx((none.kept + full.kept) / 2 - ends, rel=0.02)
    assert working(Blocks(), 2400).kept == pytest.approx(2 * none.kept, rel=0.02)


def test_offloaded_activations_are_counted_where_they_are():
    """4 inputs of blocks of 4800 tokens, 64 wide, in bf16: each above the least that is moved."""
    stay, go = working(Blocks("full"), 4800), working(Blocks("full", offload=True), 4800)
    assert go.host == stay.kept - go.kept == 4 * 4800 * 64 * 2


# ----- whole plans


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A configuration and nothing else: no weights, no tokenizer."""
    where = tmp_path_factory.mktemp("bare")
    LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"]).save_pretrained(where)
    return where


@pytest.fixture
def run(model):
    def composed(*overrides):
        given = [f"model.path={model}", "data.train=[{path: no/such.jsonl}]", "data.max_length=512"]
        return compose([*given, "batch.tokens_per_micro=2048", *overrides])

    return composed


def test_sharding_divides_and_sends(run):
    """16 bytes a parameter by two, and what `strategy.wire` says of 2 ranks and 4 micro-batches."""
    one, two = (
        plan.plan(outlined(run(f"launch.nproc={n}", "strategy=fsdp", "precision=fp32")), CPU) for n in (1, 2)
    )
    state = ("weights", "fp32 masters", "gradients", "AdamW moments")
    total = two.parameters["total"]
    assert sum(one.memory.get(key, 0) for key in state) == 16 * total
    assert sum(two.memory.get(key, 0) for key in state) == 8 * total
    assert (one.sent_per_step, two.micro_batches) == (0, 4)
    blocks = two.parameters["blocks"]
    assert two.sent_per_step == 0.5 * 4 * (2 * blocks + (total - blocks) + total) * 4


@pytest.mark.parametrize(
    "stage",
    [
        ["stage=preference"],
        ["stage=reward"],
        ["stage=grpo", "reward=verifier", "rollout.max_new_tokens=256", "stage.kl_coefficient=0.1"],
        ["stage=ppo", "reward=verifier", "rollout.max_new_tokens=256"],
        ["stage=distill", "stage.teacher=TEACHER"],
    ],
    ids=lambda stage: stage[0],
)
def test_other_stages_hold_other_models(run, model, stage):
    base = plan._model(outlined(run()), CUDA)
    found = plan.plan(outlined(run(*(part.replace("TEACHER", str(model)) for part in stage))), CUDA)
    whole = 2 * base.parameters["total"]  # bf16
    asked = 0 if stage[0] == "stage=reward" else whole
    assert found.memory.get("models that are asked", 0) == asked
    written = stage[0] in ("stage=grpo", "stage=ppo")
    assert found.memory.get("copy that writes answers", 0) == pytest.approx(whole * written, rel=0.1)
    critic = found.parameters["total"] / base.parameters["total"]
    assert critic == pytest.approx(2 if stage[0] == "stage=ppo" else 1, rel=0.01)


@pytest.mark.parametrize("top_k", ["null", 8])
def test_what_a_teacher_says_is_held_until_the_step_is_over(run, model, top_k, tmp_path):
    """Two micro-batches of 4 examples of 512 trained tokens each, a teacher of other width and more rows.

    A student's own micro-batch needs the same beside any teacher.
    """
    config = CONFIG | {"hidden_size": 96, "vocab_size": 424}
    LlamaConfig(**config, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    settings = ["stage=distill", f"stage.top_k={top_k}", "batch.sequences=8", "precision=fp32"]
    found, narrow = (
        plan.plan(outlined(run(*settings, f"stage.teacher={teacher}")), CUDA) for teacher in (tmp_path, model)
    )
    assert (found.phase, found.micro_batches) == ("a micro-batch", 2)
    width, teacher = ({} if top_k == "null" else {"likeliest": top_k}), built(config=config)
    asked = Distribution(vocabulary=400, temperature=1.0, deferred=top_k == "null", **width)
    answers = Teacher(torch.no_grad()(teacher), asked).all([batch(segments([513] * 4, 400))] * 2)
    real = [x for a in answers for x in (a.teacher_ids, a.teacher_logps, *(a.teacher_head or ()))]
    assert found.memory["what the teacher said"] == bytes_of(x for x in real if isinstance(x, torch.Tensor))
    beside = ("kept for the backward pass", "logits and other temporaries")
    assert [found.memory[name] for name in beside] == [narrow.memory[name] for name in beside]


def test_plans_that_share_what_was_worked_out_keep_their_precision(run, model):
    """A teacher of another precision is another size: 4 bytes a weight, then 2."""
    seen = plan.Seen()
    asked = [
        plan.plan(
            outlined(run("stage=distill", f"stage.teacher={model}", f"precision={kind}")), CUDA, seen=seen
        )
        for kind in ("fp32", "bf16")
    ]
    assert asked[0].memory["models that are asked"] == 2 * asked[1].memory["models that are asked"]


@pytest.mark.parametrize(
    "settings",
    [
        "strategy=fsdp",
        "adapter=lora",
        "batch.tokens_per_micro=1024",
        "precision=fp32",
        "model.activation_offload=true",
    ],
)
def test_a_changed_run_is_the_run_that_would_be_typed(run, settings):
    ours, typed = changes.changed(run(), settings), run(settings)
    assert ours.model_dump(exclude={"run_dir"}) == typed.model_dump(exclude={"run_dir"})


def test_a_change_that_is_refused_is_none(run):
    assert changes.changed(run(), "batch.tokens_per_micro=64") is None  # below data.max_length


def test_a_run_that_does_not_fit_is_told_what_would_make_it_fit(run):
    settings = ["launch.nproc=2", "launch.device=cuda"]
    needs = plan.plan(outlined(run(*settings)), CUDA).peak
    verdict = fitting.judge(run(*settings), memory=needs - 1)
    assert not verdict.fits
    by = {change.settings[0]: change.plan.peak for change in verdict.changes}
    assert {"batch.tokens_per_micro=1024", "model.activation_checkpointing=full", "strategy=fsdp"} <= set(by)
    assert all(peak < needs for peak in by.values())
    assert fitting.judge(run(*settings), memory=needs).fits
    least = min(by.values())
    several = fitting.judge(run(*settings), memory=least - 1)
    assert len(several.together.settings) > 1
    assert several.together.plan.peak < least


# ----- the command


def command(*arguments):
    line = [sys.executable, str(ROOT / "launch" / "plan.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_the_command_says_so_in_its_status(model):
    given = [f"model.path={model}", "data.train=[{path: no/such.jsonl}]"]
    fits = command("--memory", "80GiB", *given)
    assert (fits.returncode, fits.stderr) == (0, "")
    assert "fits: " in fits.stdout
    not_at_all = command("--memory", "1.05GiB", "--json", *given)
    assert not_at_all.returncode == 1
    told = json.loads(not_at_all.stdout)
    assert told["fits"] is False
    assert told["peak_bytes"] > told["memory_bytes"] == int(1.05 * 2**30)
    assert any(change["saved_bytes"] > 0 for change in told["changes"])


def test_the_command_refuses_what_training_would(tmp_path):
    refused = command(f"model.path={tmp_path}/nowhere", "data.train=[{path: no/such.jsonl}]")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: model.path=")


def test_tiny_is_as_large_as_it_is(tmp_path):
    """A directory with weights: the count is that of the tensors in the file."""
    from safetensors import safe_open

    where = tiny.write(tmp_path, tied=False)
    with safe_open(where / "model.safetensors", "pt") as file:
        elements = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    run = compose([f"model.path={where}", "data.train=[{path: no/such.jsonl}]"])
    assert plan.plan(outlined(run), CPU).parameters["total"] == elements
