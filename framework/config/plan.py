"""Will it fit: what a run will hold, compute and send on each rank, from its settings and shapes alone.

Puts together what a strategy holds (`strategy.footprint`), what a micro-batch needs beside that (`dry_run`),
what it sends (`strategy.wire`) and what it computes (`models.flops`). Reads no weight, no tokenizer and no
row of data: examples are taken to be of one length, all their tokens trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from framework.batch import Distribution
from framework.config import build, dry_run
from framework.config.blocks import blocks_of
from framework.config.build import Inspected
from framework.config.dry_run import Working
from framework.config.outlines import answers, asked
from framework.config.schema import Run
from framework.config.stage import Distill, Hf, writes
from framework.config.vocabulary import shared_rows
from framework.errors import ModelError
from framework.losses.inputs import inputs
from framework.losses.items import Items
from framework.losses.whole import Head
from framework.models import actor_critic, attention, planned
from framework.models.attention import EAGER_UP_TO, EAGER_UP_TO_FP32, OURS
from framework.models.flops import Flops, flops, parameters
from framework.models.load import Description
from framework.strategy import footprint, wire
from framework.strategy.base import Build
from framework.strategy.common import COMPUTE
from framework.strategy.footprint import Footprint, Sizes

EXTRAS = ("entropies", "mean_logps", "collisions")
APART = {"cpu": 800 * 2**20, "cuda": 2**30}
"""Bytes beside tensors. CPU: interpreter and libraries (411 MiB) and what kernels, gloo and the allocator
held on top in runs of 135M parameters, as benchmarks/plan.py measures. CUDA: usual, not measured here."""

Seen = dict[str, Any]
"""What was worked out for other plans of the same models."""


@dataclass(frozen=True)
class Plan:
    """Of one rank, in bytes, FLOPs and elements."""

    device: str  # cpu | cuda
    ranks: int
    parameters: Mapping[str, int]  # of what is trained, by part
    micro_batches: int  # of a step on a rank
    tokens_per_micro: int
    memory: Mapping[str, int]  # by what it is for, at the moment of most
    phase: str  # that moment
    host: int  # bytes in the host's memory where that is another one
    flops_per_token: float
    flops_per_step: float  # of all ranks
    sent_per_step: float  # bytes

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class _Model:
    """A model that was built without memory."""

    sizes: Sizes
    parameters: Mapping[str, int]
    flops: Flops


@dataclass
class _Phases:
    """What is held beside what is always there, moment by moment."""

    of: dict[str, dict[str, int]] = field(default_factory=dict)

    def most(self) -> tuple[str, dict[str, int]]:
        return max(self.of.items(), key=lambda entry: sum(entry[1].values()))


def plan(
    inspected: Inspected,
    device: torch.device,
    *,
    length: int | None = None,
    saving: bool = True,
    seen: Seen | None = None,
) -> Plan:
    """What a rank of the run will need on `device`, whose type alone counts.

    Examples have `length` tokens, data.max_length by default; `saving` counts the copy that a checkpoint is
    written from, where that is in the same memory. Plans that share `seen` work out what they have
    in common once. Raises ModelError for a model that cannot be tried without values.
    """
    run = inspected.run
    seen = {} if seen is None else seen
    length = min(length or run.data.max_length, run.data.max_length)
    ranks = run.launch.nproc * run.launch.nnodes
    per_example = length * answers(inspected)
    tokens = max(run.batch.tokens_per_micro // per_example, 1) * per_example
    micros = -(-run.batch.sequences * per_example // (tokens * ranks))
    model = _once(seen, _key(run, "model"), lambda: _model(inspected, device))
    working = _once(
        seen,
        _key(run, "working", device.type, tokens, length),
        lambda: _working(inspected, device, tokens, length),
    )
    shards = _shards(run, ranks)
    kept = getattr(run.strategy, "reshard_after_forward", True) is False
    cpu = device.type == "cpu"
    how: dict[str, Any] = {}
    if _family(run) == "fsdp":
        how = {"kept": kept, "several": micros > 1, "cpu": cpu}
    elif run.strategy.name == "zeropp":
        how = {"second": run.strategy.shard_size or run.launch.nproc}
    held = footprint.trained(run.strategy.name, model.sizes, shards, **how)
    others = [
        footprint.frozen(
            run.strategy.name,
            _once(seen, ("frozen", d.path, run.precision), lambda d=d: _sizes_of(d, run)),
            shards,
        )
        for d in asked(inspected)
    ]
    copy = _rollout(inspected, model)
    always = _always(held, others, copy)
    said = sum(x.nbytes for x in _said(inspected, -(-run.batch.sequences // ranks) * per_example))
    phases = _phases(held, others, working, _written(inspected) if copy else 0, said)
    if cpu:
        phases.of["loading the weights on rank 0"] = _loading(inspected, model, held)
    if cpu and saving:
        saved = 3 * footprint.FP32 * model.sizes.trained // ranks  # masters and moments, each saved once
        phases.of["a checkpoint being saved"] = {"copy that is saved": saved}
    phase, most = phases.most()
    on_host = sum(part.resident for part in (held, *others) if part.on_host)
    lengths = [length] * (run.batch.sequences * answers(inspected))
    step = model.flops.of(lengths, sum(lengths))
    return Plan(
        device=device.type,
        ranks=ranks,
        parameters=model.parameters,
        micro_batches=micros,
        tokens_per_micro=tokens,
        memory=_merged(always, most, {"beside tensors": APART[device.type]}, {"offloaded": on_host * cpu}),
        phase=phase,
        host=0 if cpu else on_host + working.host,
        flops_per_token=step / sum(lengths),
        flops_per_step=step,
        sent_per_step=_sent(run, ranks, micros, model.sizes, cpu),
    )


def _key(run: Run, what: str, *others: Any) -> str:
    """Which settings a result depends on, as text."""
    how = [
        run.stage.model_dump(mode="json"),
        run.loss.model_dump(mode="json"),
        run.adapter.model_dump(mode="json"),
    ]
    return repr([what, run.model.model_dump(mode="json"), run.precision, *how, *others])


def _once(seen: Seen, key: Any, make: Any) -> Any:
    if key not in seen:
        seen[key] = make()
    return seen[key]


def _build(inspected: Inspected, device: torch.device, name: str | None = None) -> Build:
    """The trained structure with attention that computes nothing."""
    planned.register()
    structure = build.build_structure(inspected, device, attention=name or planned.NAME)
    if inspected.critic is None:
        return structure
    critic = build.build_structure(inspected, device, of=inspected.critic, attention=name or planned.NAME)
    return actor_critic.builder(structure, critic)


def _model(inspected: Inspected, device: torch.device) -> _Model:
    module: Any = dry_run.structure(_build(inspected, device), COMPUTE[inspected.run.precision])
    parts = [module] if inspected.critic is None else [module.policy, module.critic]
    each = [parameters(part) for part in parts]
    costs = [flops(part) for part in parts]
    return _Model(
        sizes=_sizes(module, inspected.run.precision),
        parameters={name: sum(counts[name] for counts in each) for name in each[0]},
        flops=Flops(
            sum(cost.token for cost in costs),
            sum(cost.trained for cost in costs),
            tuple(layer for cost in costs for layer in cost.layers),
        ),
    )


def _sizes(module: Any, precision: str) -> Sizes:
    """Elements of a built model, tied ones once."""

    def count(parameters: Any, *, trained: bool = False) -> int:
        return sum(p.numel() for p in parameters if p.requires_grad or not trained)

    blocks = [list(block.parameters()) for block in module.blocks()]
    inside = {p for block in blocks for p in block}
    rest = [p for p in module.parameters() if p not in inside]
    return Sizes(
        blocks=count(inside),
        rest=count(rest),
        trained_blocks=count(inside, trained=True),
        trained_rest=count(rest, trained=True),
        block=max(count(block) for block in blocks),
        trained_block=max(count(block, trained=True) for block in blocks),
        weight_bytes=COMPUTE[precision].itemsize,
    )


def _sizes_of(description: Description, run: Run) -> Sizes:
    """Of a model that is only asked."""
    planned.register()
    bare = build.load.builder(description, attention=planned.NAME, head_chunk_tokens=1)
    return _sizes(dry_run.structure(bare, COMPUTE[run.precision]), run.precision)


def _working(inspected: Inspected, device: torch.device, tokens: int, length: int) -> Working:
    run = inspected.run
    name = _attention(inspected, device, length)
    module = dry_run.structure(_build(inspected, device, name), COMPUTE[run.precision])
    options: dict[str, Any] = {}
    given: tuple[torch.Tensor, ...] = ()
    if inspected.description.head == "lm":
        needs = inputs(inspected.loss) & set(EXTRAS)
        options["needs"] = frozenset(needs | ({"values"} if inspected.critic is not None else set()))
        if isinstance(run.stage, Distill):
            given = _said(inspected, tokens)
            options = {"distribution": _taught(inspected, run.stage, *given)}
    try:
        blocks = blocks_of(_eager(run), device)
        return dry_run.rehearse(module, blocks, dry_run.rows(tokens, length), given=given, **options)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ModelError(
            f"model type {inspected.description.config.model_type} cannot be planned: its forward pass "
            f"depends on values ({str(error).splitlines()[0]}); start a run of steps=2 and read "
            "peak_memory_bytes"
        ) from error


def _eager(run: Run) -> Run:
    """Without the compiler and torchao, which need not be there to plan and keep the same."""
    changes = {"compile": "none", "fp8": None}
    return run.model_copy(update={"model": run.model.model_copy(update=changes)})


def _said(inspected: Inspected, tokens: int) -> tuple[torch.Tensor, ...]:
    """What a teacher says of `tokens`: of all words its hidden states and one copy of its head, else the
    likeliest and their log-probabilities."""
    stage, teacher = inspected.run.stage, inspected.teacher
    if not isinstance(stage, Distill) or teacher is None:
        return ()
    if stage.top_k is not None:
        ids = torch.empty(tokens, stage.top_k, dtype=torch.int64, device=dry_run.META)
        return ids, torch.empty_like(ids, dtype=torch.float32)
    width = teacher.config.get_text_config(decoder=True).hidden_size
    rows, dtype = shared_rows(inspected.description, teacher), COMPUTE[inspected.run.precision]
    hidden, weight = (torch.empty(n, width, dtype=dtype, device=dry_run.META) for n in (tokens, rows))
    return hidden, weight


def _taught(inspected: Inspected, stage: Distill, *said: torch.Tensor) -> Distribution:
    assert inspected.teacher is not None
    rows = shared_rows(inspected.description, inspected.teacher)
    asked = Distribution(vocabulary=rows, temperature=stage.temperature)
    if stage.top_k is not None:
        return replace(asked, ids=said[0])
    return replace(
        asked,
        teacher=Head(said[0], said[1], None, 1.0, None),
        divergence=lambda own, said, weight: Items((own - said).sum(1), weight),
    )


def _attention(inspected: Inspected, device: torch.device, length: int) -> str:
    """What stands for the attention that will be used: explicit where that will keep scores."""
    chosen = build.attention_of(inspected, device)
    dtype = COMPUTE[inspected.run.precision]
    short = device.type == "cpu" and length <= EAGER_UP_TO.get(dtype, EAGER_UP_TO_FP32)
    if chosen == OURS["eager"] or (chosen == OURS["auto"] and short):
        return OURS["eager"]
    return planned.COPYING if device.type == "cpu" and inspected.run.data.packing else planned.NAME


def _rollout(inspected: Inspected, model: _Model) -> int:
    """Bytes of a copy of the policy that answers."""
    run = inspected.run
    asked = run.evaluate.prompts or run.retain.prompts
    if not (writes(run.stage) or asked) or not isinstance(run.rollout, Hf):
        return 0
    policy = model.parameters["total"]
    if inspected.critic is not None:
        policy //= 2  # as good as alike
    return policy * COMPUTE[run.precision].itemsize


def _written(inspected: Inspected) -> int:
    """Bytes of keys and values of answers that are written together, at their longest, and their logits."""
    run, text = inspected.run, inspected.description.config.get_text_config(decoder=True)
    assert isinstance(run.rollout, Hf)
    prompts = getattr(run.stage, "prompts", run.batch.sequences if writes(run.stage) else 1)
    answers = min(run.rollout.batch_size, run.rollout.samples * prompts)
    width = attention._head_width(text) * (
        getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    )
    cache = 2 * text.num_hidden_layers * width * run.data.max_length * COMPUTE[run.precision].itemsize
    return int(answers * (cache + 3 * 4 * text.vocab_size))


def _shards(run: Run, ranks: int) -> int:
    """Ranks that share a copy of the model."""
    if run.strategy.name != "hsdp":
        return ranks
    return getattr(run.strategy, "shard_size", None) or run.launch.nproc


def _family(run: Run) -> str:
    return "fsdp" if run.strategy.name in ("fsdp", "hsdp", "fsdp_offload") else run.strategy.name


def _always(held: Footprint, asked: list[Footprint], copy: int) -> dict[str, int]:
    """Bytes that are on the device from the first step to the last."""
    own = Footprint(0, 0, 0, 0) if held.on_host else held
    return {
        "weights": own.weights,
        "fp32 masters": own.masters,
        "gradients": own.gradients,
        "AdamW moments": own.moments,
        "models that are asked": sum(part.resident for part in asked if not part.on_host),
        "copy that writes answers": copy,
    }


def _phases(held: Footprint, asked: list[Footprint], working: Working, written: int, said: int) -> _Phases:
    """`said` by a teacher is there until the step is over."""
    kept, peak = "kept for the backward pass", "logits and other temporaries"
    leaving = "gradients on their way"
    there = {"what the teacher said": said, "gathered weights": held.gathered}
    phases = _Phases()
    phases.of["a micro-batch"] = {kept: working.kept, peak: working.peak - working.kept, **there}
    if held.reducing:
        phases.of["a micro-batch's gradients leaving"] = {
            kept: working.kept,
            **there,
            leaving: held.reducing,
        }
    if held.ending:
        phases.of["the last gradients leaving"] = {**there, leaving: held.ending}
    if written:
        phases.of["answers being written"] = {"keys, values and logits of answers": written}
    if asked:
        gathered = max(part.gathered for part in asked)
        phases.of["another model being asked"] = {**there, "gathered weights": gathered}
    return phases


def _loading(inspected: Inspected, model: _Model, held: Footprint) -> dict[str, int]:
    """Rank 0 reads a whole model while gradients and moments do not exist yet."""
    description = inspected.description
    fp32 = description.init == "random" or description.source.gguf_file is not None
    stored = 4 if fp32 else getattr(description.config.dtype, "itemsize", 4)
    whole = stored * model.sizes.every
    return {"the model as it is read": max(0, whole - held.gradients - held.moments)}


def _sent(run: Run, ranks: int, micros: int, sizes: Sizes, gloo: bool) -> float:
    if ranks == 1:
        return 0.0
    load = wire.Load(sizes.blocks, sizes.rest, sizes.trained, sizes.weight_bytes)
    kept = getattr(run.strategy, "reshard_after_forward", True) is False
    match run.strategy.name:
        case "ddp":
            return wire.ddp(ranks, micros, load)
        case "hsdp":
            return wire.hsdp(ranks, micros, load, shards=_shards(run, ranks), kept=kept)
        case "zero1":
            return wire.zero1(ranks, micros, load)
        case "zero2":
            return wire.zero2(ranks, micros, load)
        case "zero3" | "zero3_offload" | "zeropp":  # of zeropp the most: nothing rounded, one host
            return wire.zero3(ranks, micros, load, gloo=gloo)
        case _:
            return (wire.fsdp_kept if kept else wire.fsdp)(ranks, micros, load)


def _merged(*parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for part in parts for name, size in part.items() if size}
