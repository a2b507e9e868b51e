"""From a prepared run to what answers and what says what answers are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from framework.config import build
from framework.config.build import Inspected, Prepared
from framework.config.nodes import Lora
from framework.config.schema import Run
from framework.config.stage import Hf, RewardFunction
from framework.data.prompts import Prompts, PromptTable
from framework.models import load, nf4
from framework.rollout.assess import Assessment, Assessor
from framework.rollout.base import CRITIC, Completion, Prompt, Rollout, Sampling
from framework.rollout.experience import Packing
from framework.rollout.hf import HfRollout
from framework.rollout.judge import Judge, Spec
from framework.rollout.pool import Limits
from framework.stages.judge import ModelReward, Scored
from framework.strategy.base import Engine, World
from framework.train.trainer import Assess, Report

MIB = 2**20


def sampling_of(run: Run) -> Sampling:
    """How answers to learn from are drawn."""
    chosen = run.rollout
    return Sampling(
        max_new_tokens=chosen.max_new_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
        samples=chosen.samples,
        seed=run.seed,
    )


class Unpacked:
    """A rollout that is handed weights in four bits as the plain ones they stand for."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self.generate, self.close = rollout.generate, rollout.close

    def update(self, weights: Iterator[tuple[str, Tensor]], *, version: int) -> None:
        """See `framework.rollout.base.Rollout`."""
        self._rollout.update(nf4.unpacked(weights), version=version)


def build_rollout(inspected: Inspected, world: World) -> Rollout:
    """A copy of the policy that answers; it is empty until its first `update`."""
    rollout = _rollout(inspected, world)
    return Unpacked(rollout) if inspected.run.adapter.kind == "qlora" else rollout


def _rollout(inspected: Inspected, world: World) -> Rollout:
    run, description, chosen = inspected.run, inspected.description, inspected.run.rollout
    lora = run.adapter if isinstance(run.adapter, Lora) else None
    common: dict[str, Any] = {
        "dtype": load.DTYPES[run.precision],
        "lora_scaling": lora.alpha / lora.rank if lora else None,
    }
    if isinstance(chosen, Hf):
        structure = partial(load.unfilled, description)
        return HfRollout(structure, description.tokenizer, world, batch_size=chosen.batch_size, **common)
    from framework.rollout.vllm import Colocated, Server, VllmRollout

    engine: Server | Colocated
    if chosen.url is not None:
        engine = Server(chosen.url, timeout_s=chosen.timeout_s)
    else:
        engine = Colocated(
            str(description.source.directory),
            world,
            max_length=run.data.max_length,
            memory_share=chosen.memory_share,
            dtype={"bf16": "bfloat16", "fp32": "float32"}[run.precision],
        )
    ends = load.generation_config(description).eos_token_id
    known = ends if isinstance(ends, list) else [ends]
    ids = {token for token in [*known, description.tokenizer.eos_token_id] if token is not None}
    return VllmRollout(engine, description.tokenizer, world, ends=ids, **common)


class Reward:
    """The weighted sum of reward functions and a reward model, either of which may be absent."""

    def __init__(self, judge: Judge | None, model: ModelReward | None, model_weight: float) -> None:
        self.judge, self.model, self.model_weight = judge, model, model_weight

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scored:
        """[N] scores, alike on all ranks. Collective."""
        scores = torch.zeros(len(completions), dtype=torch.float64)
        metrics: dict[str, float] = {}
        if self.judge is not None:
            judged = self.judge(prompts, completions)
            scores, metrics = scores + judged.scores, dict(judged.metrics)
        if self.model is not None:
            said = self.model(prompts, completions).scores
            scores = scores + self.model_weight * said
            metrics["reward/model"] = float(said.mean())
        return Scored(scores, metrics)


def build_reward(inspected: Inspected, world: World, packing: Packing) -> Reward:
    """What answers to learn from are worth."""
    chosen = inspected.run.reward
    judge = _judge(inspected.run, chosen.judging, world) if chosen.judging else None
    model = None
    if inspected.judge is not None:
        frozen = build.build_frozen(inspected, inspected.judge, world)
        model = ModelReward(frozen, packing=packing, world=world)
    return Reward(judge, model, chosen.model_weight)


def build_assess(prepared: Prepared, world: World, engine: Engine, rollout: Rollout) -> Assess:
    """Answers the run's questions with the weights of the moment, greedily, and has them judged."""
    run = prepared.run
    questions = _Asking(run, world, run.evaluate.score)
    assessors: dict[str, Callable[[], Any]] = {}
    for table in prepared.questions:
        count = min(len(table), run.evaluate.max_examples or len(table))
        prompts = asked(table, count, seed=run.seed)
        assessors[table.name] = questions.assessor(prepared, rollout, prompts, shown=run.evaluate.samples)

    def assess(step: int) -> tuple[Mapping[str, float], Sequence[Report]]:
        rollout.update(engine.weights(without=CRITIC), version=step)
        metrics: dict[str, float] = {}
        lines: list[Report] = []
        for name, assessor in assessors.items():
            found = assessor()
            metrics |= {f"{name}/{key}": value for key, value in found.metrics.items()}
            if found.samples:
                lines.append(("samples", {"rows": list(found.samples)}))
        return metrics, lines

    return assess


def build_ask(
    prepared: Prepared, world: World, rollout: Rollout
) -> tuple[Callable[[Sequence[Prompt]], Assessment], dict[str, Any]]:
    """(what answers `retain.prompts` and has them judged, what decides about right and wrong; JSON)."""
    run = prepared.run
    asking = _Asking(run, world, run.retain.score or run.evaluate.score)
    return lambda prompts: asking.assessor(prepared, rollout, prompts, shown=0)(), asking.identity


def asked(table: PromptTable, count: int, *, seed: int) -> list[Prompt]:
    """The first `count` prompts of a table."""
    found = Prompts([table], seed=seed, shuffle=False).take(0, count)
    return [Prompt(**vars(prompt)) for prompt in found]


class _Asking:
    """How questions are answered, greedily, and judged: by `score`, else by the functions of `reward`."""

    def __init__(self, run: Run, world: World, score: RewardFunction | None) -> None:
        self.functions: Sequence[RewardFunction] = run.reward.judging if score is None else (score,)
        self.judge = _judge(run, self.functions, world)
        decisive = (f.called for f in self.functions if f.only_exact or f is run.reward.environment)
        self.verifier = next(decisive, self.functions[0].called)
        self.sampling = Sampling(max_new_tokens=run.rollout.max_new_tokens, temperature=0.0, seed=run.seed)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides about right and wrong; JSON."""
        functions = [function.model_dump(mode="json") for function in self.functions]
        return {"functions": functions, "max_new_tokens": self.sampling.max_new_tokens}

    def assessor(
        self, prepared: Prepared, rollout: Rollout, prompts: Sequence[Prompt], *, shown: int
    ) -> Assessor:
        """What answers and judges `prompts` whenever it is called."""
        decode = partial(prepared.description.tokenizer.decode, skip_special_tokens=True)
        return Assessor(
            rollout,
            prompts,
            self.judge,
            self.sampling,
            decode=decode,
            verifier=self.verifier,
            shown=shown,
        )


def _judge(run: Run, functions: Sequence[RewardFunction], world: World) -> Judge:
    chosen = run.reward
    specs = [Spec(f.called, f.target, f.keywords, f.weight, f.only_exact, f.only_finished) for f in functions]
    limits = Limits(timeout_s=chosen.timeout_s, memory_bytes=chosen.memory_mib * MIB)
    return Judge(specs, world, workers=chosen.workers, limits=limits, max_failed=chosen.max_failed)
