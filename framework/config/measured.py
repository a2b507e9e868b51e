"""One run of a few steps, measured: losses, the first gradient, the weights at its end.

The same function on every rank, through the whole configuration. Gradients are read from AdamW's first moment
after one step, (1 - beta1) * gradient: the one place where every strategy keeps them whole, in fp32 and by
name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework.config import build, compose, judging, stages
from framework.config.stage import ONLINE, writes
from framework.models import load, nf4
from framework.strategy.base import FIRST, World
from framework.train.meter import Meter
from framework.train.trainer import accumulate

OF_THE_RANKS = ("seconds", "tokens_per_s", "peak_memory_bytes", "micros", "packing_efficiency")
"""What a line says of how the work was spread."""


def measure(world: World, arguments: Sequence[str], *, steps: int) -> dict[str, Any]:
    """A run of `steps` steps. Collective.

    `losses`, `norms` and `lines` of every step; `micros`, this rank's micro-batches of each; `rollouts`,
    metrics without what is timed, and `tokens`, the answers of each; `gradient` of the first step before
    clipping, this rank's slices as (shape, start, values); on rank 0 `weights`, what is trained, whole, after
    the last step.
    """
    run = compose.compose(arguments)
    prepared = build.prepare(run)
    engine = build.build_engine(prepared, world)
    rollout = judging.build_rollout(prepared, world) if writes(run.stage) else None
    stage = stages.build_stage(prepared, world, engine, rollout)
    rate, meter = build.learning_rate(prepared), Meter(world)
    answer: dict[str, Any] = {"lines": [], "micros": [], "rollouts": [], "tokens": []}
    for step in range(steps):
        began = stage.resting
        terms = stage.next(step)
        if began and run.stage.name in ONLINE:
            answer["tokens"].append([c.ids for c in stage._experience.completions])  # type: ignore[attr-defined]
        answer["micros"].append(len(terms[0].micros))
        accumulate(engine, terms, seed=run.seed, step=step, meter=meter)
        answer["rollouts"] += [
            {name: value for name, value in metrics.items() if not name.startswith("seconds")}
            for kind, metrics in stage.reports()
            if kind == "rollout"
        ]
        norm = engine.step(lr=rate(step), max_grad_norm=run.optim.max_grad_norm)
        line = {name: value for name, value in meter.line().items() if name not in OF_THE_RANKS}
        answer["lines"].append(line | {"grad_norm": norm})
        if step == 0:
            # what clipping took is given back: a mean in place of a sum would hide behind it
            clipped = 1.0 if run.optim.max_grad_norm is None else (norm + 1e-6) / run.optim.max_grad_norm
            scale = max(1.0, clipped) / (1 - run.optim.betas[0])
            answer["gradient"] = {
                name: [(s.shape, s.start, s.values[FIRST] * scale) for s in shards]
                for name, shards in engine.state_dict().shards.items()
            }
    answer["losses"] = [line["loss"] for line in answer["lines"]]
    answer["norms"] = [line["grad_norm"] for line in answer["lines"]]
    weights = {name: w.to("cpu", copy=True) for name, w in engine.weights() if name in engine.trained}
    answer["weights"] = weights if world.rank == 0 else {}
    return answer


def whole(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The gradient by name from all ranks' slices. Raises ValueError unless every element comes once."""
    flat: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    shapes = {}
    for rank in ranks:
        for name, slices in rank["gradient"].items():
            for shape, start, values in slices:
                size = torch.Size(shape).numel()
                flat.setdefault(name, torch.zeros(size))[start : start + len(values)] = values
                seen.setdefault(name, torch.zeros(size))[start : start + len(values)] += 1
                shapes[name] = shape
    for name, count in seen.items():
        if not bool((count == 1).all()):
            raise ValueError(f"{name}: not every element of its gradient comes from one rank")
    return {name: values.view(shapes[name]) for name, values in flat.items()}


def plain(world: World, arguments: Sequence[str], *, steps: int) -> dict[str, Any]:
    """Supervised training by plain means: one example at a time, whole logits, torch's AdamW, one process.

    Answers as `measure` does, with the whole `gradient` by name. For qlora it is LoRA over weights in fp32
    that were replaced by what four bits leave of them.
    """
    run = compose.compose(arguments)
    prepared = build.prepare(run)
    adapter, filling = build.adapter_of(run), build.build_weights(prepared)()
    if run.adapter.kind == "qlora":
        adapter, filling = {**run.adapter.model_dump(), "kind": "lora"}, nf4.unpacked(filling)
    module = load.builder(prepared.description, attention="eager", head_chunk_tokens=1, adapter=adapter)()
    lm: Any = module.lm
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in filling:
            parameters[name].copy_(tensor)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=run.optim.lr, betas=run.optim.betas, eps=run.optim.eps, weight_decay=0.0
    )
    answer: dict[str, Any] = {"losses": [], "norms": [], "tokens": []}
    for step in range(steps):
        first = step * run.batch.sequences
        examples = [
            prepared.tables[pick.source].example(pick.row)
            for pick in prepared.mixture.picks(first, first + run.batch.sequences)
        ]
        units = sum(int(mask[1:].sum()) for _, mask in examples)
        optimizer.zero_grad()
        loss = 0.0
        for ids, mask in examples:
            tokens = torch.tensor(ids, dtype=torch.int64)[None]
            logits = lm(input_ids=tokens, use_cache=False).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
            total = nll[torch.tensor(mask[1:].astype(bool))].sum() / units
            total.backward()
            loss += float(total.detach())
        if step == 0:
            answer["gradient"] = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        limit = float("inf") if run.optim.max_grad_norm is None else run.optim.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), limit)
        optimizer.step()
        answer["losses"].append(loss)
        answer["norms"].append(float(norm))
    answer["weights"] = {name: p.detach() for name, p in trained.items()}
    return answer
