"""One small run, carried out by any strategy, and by plain transformers as the reference.

Gradients are read from AdamW's first moment after one unclipped step, (1 - beta1) * gradient: the one
place where every strategy keeps them whole, in fp32 and by name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BETA1 = 0.9


def write_rows(path: Path, rows: int = 60, seed: int = 0) -> Path:
    """Chats of very uneven length, some of two turns."""
    draw = random.Random(seed)
    words = "the capital of France is Paris one two three four five words list story".split()

    def say(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    with path.open("w") as file:
        for row in range(rows):
            messages = []
            for _ in range(1 + (row % 5 == 0)):
                messages.append({"role": "user", "content": say(8)})
                messages.append({"role": "assistant", "content": say(3 if row % 3 else 20)})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def overrides(model: Path, data: Path, cache: Path, **changes: Any) -> list[str]:
    """A command line in fp32 with everything small."""
    values = {
        "model.path": model,
        "data.train": f"[{{path: {data}}}]",
        "data.cache_dir": cache,
        "data.max_length": 128,
        "batch.sequences": 24,
        "batch.tokens_per_micro": 128,
        "precision": "fp32",
        "optim.lr": 1e-3,
        "optim.betas": f"[{BETA1}, 0.95]",
        "optim.max_grad_norm": "null",
        "schedule": "constant",
        "schedule.warmup_steps": 0,
        "steps": 20,
        "launch.device": "cpu",
        "run_dir": cache / "run",
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in values.items()]


def train(world: Any, arguments: Sequence[str], *, steps: int) -> dict[str, Any]:
    """Losses, norms and the first step's gradient (this rank's slices) of a run."""
    from framework.config import build, compose, stages
    from framework.strategy.base import FIRST
    from framework.train.meter import Meter
    from framework.train.trainer import accumulate

    run = compose.compose(arguments)
    prepared = build.prepare(run)
    engine = build.build_engine(prepared, world)
    stage = stages.build_stage(prepared, world, engine)
    rate, meter = build.learning_rate(prepared), Meter(world)
    answer: dict[str, Any] = {"losses": [], "norms": [], "micros": []}
    for step in range(steps):
        terms = stage.next(step)
        answer["micros"].append(len(terms[0].micros))
        accumulate(engine, terms, seed=run.seed, step=step, meter=meter)
        answer["norms"].append(engine.step(lr=rate(step), max_grad_norm=run.optim.max_grad_norm))
        answer["losses"].append(meter.line()["loss"])
        if step == 0:
            answer["gradient"] = {
                name: [(shard.shape, shard.start, shard.values[FIRST] / (1 - BETA1)) for shard in shards]
                for name, shards in engine.state_dict().shards.items()
            }
    return answer


def whole(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The gradient by name from all ranks' slices; every element must come from one rank exactly."""
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
    assert all(bool((count == 1).all()) for count in seen.values())
    return {name: values.view(shapes[name]) for name, values in flat.items()}


def reference(arguments: Sequence[str], *, steps: int) -> dict[str, Any]:
    """The same run by plain means: one example at a time, whole logits, torch's AdamW, one process.

    For qlora that is LoRA over weights in fp32 that were replaced by what four bits leave of them.
    """
    from framework.config import build, compose
    from framework.models import load, nf4

    run = compose.compose(arguments)
    prepared = build.prepare(run)
    adapter = None if run.adapter.kind == "full" else run.adapter.model_dump()
    weights = build.build_weights(prepared)()
    if run.adapter.kind == "qlora":
        adapter, weights = {**adapter, "kind": "lora"}, nf4.unpacked(weights)
    module = load.builder(prepared.description, attention="eager", head_chunk_tokens=1, adapter=adapter)()
    with torch.no_grad():
        parameters = dict(module.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=run.optim.lr, betas=run.optim.betas, weight_decay=0.0)
    answer: dict[str, Any] = {"losses": [], "norms": []}
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
            logits = module.lm(input_ids=tokens, use_cache=False).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
            total = nll[torch.tensor(mask[1:].astype(bool))].sum() / units
            total.backward()
            loss += float(total.detach())
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values()])
        if step == 0:
            answer["gradient"] = {name: p.grad.clone() for name, p in trained.items()}
        optimizer.step()
        answer["losses"].append(loss)
        answer["norms"].append(float(norm))
    return answer
