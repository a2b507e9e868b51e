"""The composition root: from a validated run to the objects that carry it out.

The only place that knows all rooms. `prepare` does everything that can refuse a run before a weight is
loaded; `config.work` is what every rank does with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from framework.config import carrying, environment, fp8, probes, record, selfmade, tabled, targets, vocabulary
from framework.config.nodes import Full, Wsd
from framework.config.schema import Run
from framework.config.spread import build_strategy
from framework.config.stage import ONLINE, SUPERVISED, Distill, Grpo, Ppo, writes
from framework.data import prompts
from framework.data.mixture import Mixture
from framework.data.prompts import PromptTable
from framework.data.tables import Table
from framework.data.tokenise import Progress
from framework.losses.inputs import inputs
from framework.losses.items import Items
from framework.models import actor_critic, answering, freezing, load
from framework.strategy.base import Build, Engine, Frozen, Weights, World
from framework.train.checkpoint import Checkpointer
from framework.train.optim import adamw
from framework.train.schedule import Schedule, schedule
from framework.train.trainer import Plan

NOT_LEARNT = {"sources", "carry", "select", "share_of", "additive"}
"""Keys of replay that are known by what they lead to, or that decide what is left and not what is learnt."""


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """A run whose loss is bound and whose models were looked at."""

    run: Run
    loss: Callable[..., Items]
    description: load.Description  # of what is trained; of the actor where there is a critic
    critic: load.Description | None = None
    judge: load.Description | None = None  # of the reward model
    reference: load.Description | None = None  # of another start to compare with
    teacher: load.Description | None = None  # of the model that is imitated

    @property
    def unpaired(self) -> bool:
        """Whether the loss judges single answers."""
        return self.run.stage.name == "preference" and "desirable" in inputs(self.loss)


@dataclass(frozen=True, kw_only=True)
class Prepared(Inspected):
    """A run that nothing refuses any more: its data is tokenised, too."""

    tables: Sequence[Table]  # data.train; in supervised runs replay after it
    held_out: Sequence[Table]
    mixture: Mixture
    steps: int
    replay: Sequence[Table] = ()  # of a term of its own
    retention: Sequence[Table] = ()
    important: Sequence[Table] = ()  # text whose Fisher information says which weights matter
    questions: Sequence[PromptTable] = ()
    retain_questions: Sequence[PromptTable] = ()  # of which it is watched what is answered right
    probes: probes.Probes | None = None  # what is watched for forgetting
    carried: carrying.Carried | None = None  # what earlier stages have left

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        run, shown = self.run, record.shown(self.run)  # it goes into checkpoints, so it holds no secret
        identity: dict[str, Any] = {
            "model": self.description.fingerprint,
            "adapter": run.adapter.model_dump(mode="json"),
            "data": {table.name: table.fingerprint for table in (*self.tables, *self.replay)},
            "mixture": {
                "seed": run.seed,
                "shuffle": run.data.shuffle,
                "weights": [table.weight for table in self.tables],
                "replay": run.replay.fraction,
            },
            "batch.sequences": run.batch.sequences,
        }
        if run.replay.share_of != "trained_tokens":
            identity["mixture"]["share_of"] = run.replay.share_of
        if run.replay.max_forgetting is not None and self.probes is not None:
            identity["budget"] = run.replay.model_dump(mode="json", exclude=NOT_LEARNT)
            identity["probes"] = self.probes.identity
            if run.replay.unit == "accuracy":
                identity["questions"] = {
                    "tables": {table.name: table.fingerprint for table in self.retain_questions},
                    "ask_every": run.retain.ask_every,
                    "score": [shown["retain"]["score"], shown["evaluate"]["score"]],
                    "max_new_tokens": run.rollout.max_new_tokens,
                }
        if run.replay.objective == "start":
            identity["replay"] = run.replay.model_dump(mode="json", include={"objective", "likeliest"})
        if (protect := run.protect).chosen:  # what comes after the last step may still change
            identity["protect"] = protect.model_dump(mode="json", exclude={"sources", "interpolate"})
            identity["important"] = [table.fingerprint for table in self.important]
        if self.carried is not None and self.carried.sources:
            identity["buffer"] = self.carried.buffer.identity
        if run.stage.name != "sft":
            identity["stage"] = shown["stage"]
            identity["replay"] = run.replay.model_dump(mode="json", exclude=NOT_LEARNT)
        if writes(run.stage):
            identity["rollout"] = run.rollout.model_dump(
                mode="json", include={"samples", "temperature", "top_p", "top_k", "max_new_tokens", "engine"}
            )
        if run.stage.name in ONLINE:
            identity["reward"] = {key: value for key, value in shown["reward"].items() if key != "workers"}
        for name in ("critic", "judge", "reference", "teacher"):
            if (other := getattr(self, name)) is not None:
                identity[name] = other.fingerprint
        return identity


def inspect(run: Run) -> Inspected:
    """Bind the loss and look at the models. Raises UserError."""
    stage = run.stage
    targets.rewards(run)
    own: dict[str, Any] = {
        "revision": run.model.revision,
        "gguf_file": run.model.gguf_file,
        "init": run.model.init,
    }
    quantised = run.adapter.kind == "qlora"
    head = "score" if stage.name == "reward" else "lm"
    description = load.inspect(run.model.path, head=head, quantised=quantised, **own)
    critic = judge = reference = teacher = None
    if isinstance(stage, Ppo):
        critic = load.inspect(stage.critic, head="score", quantised=quantised) if stage.critic else None
        critic = critic or load.inspect(run.model.path, head="score", **own)
        actor_critic.check(description, critic)
    if stage.name in ONLINE and run.reward.model is not None:
        judge = answering.inspect_scorer(run.reward.model)
        vocabulary.same_words(description, judge, "reward.model")
    if (path := getattr(stage, "reference_path", None)) is not None:
        reference = load.inspect(path)
        vocabulary.same_words(description, reference, "stage.reference_path")
    if isinstance(stage, Distill):
        teacher = load.inspect(stage.teacher)
        vocabulary.check_teacher(description, teacher, stage.top_k)
    return Inspected(
        run=run,
        loss=targets.loss(run),
        description=description,
        critic=critic,
        judge=judge,
        reference=reference,
        teacher=teacher,
    )


def prepare(run: Run, *, progress: Progress | None = None) -> Prepared:
    """Bind the loss, look at the models, tokenise the data; loads no weight and uses no accelerator.

    But for `self:` in replay.sources: where the cache has no such text, the start model writes it, in
    processes of its own. Every process of a host may call it: the first builds the cache, the others wait
    and map it. Raises UserError.
    """
    inspected = inspect(run)
    fp8.check(inspected)
    given, held_out = environment.sources(run)
    run, carried = carrying.fed(run)
    inspected = replace(inspected, run=run)
    read = partial(tabled.read, inspected, progress=progress)
    text = partial(tabled.text, inspected, progress=progress)
    mixed, online = run.stage.name in SUPERVISED, run.stage.name in ONLINE
    train_tables, retention = read(given), text(run.evaluate.retention)
    held_out_tables = () if online else read(held_out)
    asked = [*run.evaluate.prompts, *(held_out if online else ())]
    questions, retain_questions = (
        tabled.questions(inspected, each, progress=progress) if each else ()
        for each in (asked, run.retain.prompts)
    )
    # Last: the start model may have to write it, and what else is refused is refused before.
    replay_tables = carrying.read(run, carried, selfmade.sources_of(run, inspected.description), text)
    if online:
        mixture = prompts.Prompts(train_tables, seed=run.seed, shuffle=run.data.shuffle).mixture
    else:
        mixture = Mixture(
            tabled.group(train_tables, run.replay.share_of),
            tabled.group(replay_tables, run.replay.share_of) if replay_tables and mixed else None,
            fraction=run.replay.fraction,
            seed=run.seed,
            shuffle=run.data.shuffle,
        )
    named = tabled.distinct([*train_tables, *replay_tables])
    fisher = run.protect.importance == "fisher"
    important = (text(run.protect.sources) or replay_tables) if fisher else []
    carrying.check(run, carried, [table.name for table in named])
    steps = _steps(run, mixture, sum(map(len, train_tables)))
    return Prepared(
        **vars(inspected),
        tables=named if mixed else named[: len(train_tables)],
        replay=() if mixed else named[len(train_tables) :],
        held_out=held_out_tables,
        retention=retention,
        important=important,
        questions=questions,
        retain_questions=retain_questions,
        mixture=mixture,
        steps=steps,
        probes=probes.prepare(
            run, retention, [*named, *important], steps, tabled.options(inspected), retain_questions
        ),
        carried=carried,
    )


def _steps(run: Run, mixture: Mixture, rows: int) -> int:
    """Optimizer steps of the run: with replay that adds, as many more as that takes."""
    sequences, adds = run.batch.sequences, run.replay.additive
    if run.steps is not None:
        return -(-mixture.examples_with(run.steps * sequences) // sequences) if adds else run.steps
    assert run.epochs is not None  # the schema: exactly one of the two
    if not isinstance(run.stage, Ppo | Grpo):
        if adds is False:
            return -(-math.ceil(run.epochs * rows) // sequences)
        return mixture.steps_for(run.epochs, sequences)
    iterations = max(1, round(run.epochs * rows / run.stage.prompts))
    in_one = -(-run.stage.prompts * run.rollout.samples // sequences) * run.stage.epochs
    return iterations * in_one


def checkpointer(prepared: Prepared, world: World) -> Checkpointer:
    """The run's checkpoints."""
    return Checkpointer(
        Path(prepared.run.run_dir) / "checkpoints",
        world=world,
        keep=prepared.run.checkpoint.keep,
        identity=prepared.identity,
    )


def build_engine(inspected: Inspected, world: World) -> Engine:
    """What is trained, spread over the ranks and filled."""
    run = inspected.run
    optimizer = partial(adamw, betas=run.optim.betas, eps=run.optim.eps, weight_decay=run.optim.weight_decay)
    structure = freezing.frozen(build_structure(inspected, world.device), run.protect.freeze)
    weights = build_weights(inspected)
    if inspected.critic is not None:
        assert isinstance(run.stage, Ppo)
        optimizer = partial(optimizer, lr_scales={actor_critic.CRITIC: run.stage.critic_lr_scale})
        structure = actor_critic.builder(
            structure, build_structure(inspected, world.device, of=inspected.critic)
        )
        keep = run.stage.critic_head == "kept"
        critic = load.reader(
            inspected.critic, adapter=adapter_of(run), seed=run.seed, zero_head=True, keep_head=keep
        )
        weights = actor_critic.reader(weights, critic)
    return build_strategy(run, world).train(structure, weights, optimizer)


def build_frozen(
    inspected: Inspected, of: load.Description, world: World, *, attention: str | None = None
) -> Frozen:
    """A model that is only asked, spread like the one that is trained; `attention` may be its own."""
    bare = replace(inspected, run=inspected.run.model_copy(update={"adapter": Full(kind="full")}))
    structure = build_structure(bare, world.device, of=of, attention=attention)
    return build_strategy(inspected.run, world).freeze(structure, load.reader(of, seed=inspected.run.seed))


def attention_of(inspected: Inspected, device: torch.device, *, of: load.Description | None = None) -> str:
    """How attention is computed on `device`, as transformers knows it, in the trained model or in `of`."""
    run = inspected.run
    return load.attention_for(
        of or inspected.description, run.model.attention, device, precision=run.precision
    )


def build_structure(
    inspected: Inspected,
    device: torch.device,
    *,
    of: load.Description | None = None,
    attention: str | None = None,
) -> Build:
    """Makes a model without its weights, the trained one or `of`; `device` decides about attention."""
    run = inspected.run
    return load.builder(
        of or inspected.description,
        adapter=adapter_of(run),
        attention=attention or attention_of(inspected, device),
        head_chunk_tokens=run.model.head_chunk_tokens,
        neftune_alpha=run.model.neftune_alpha,
    )


def build_weights(inspected: Inspected) -> Weights:
    """Reads or makes the weights, on rank 0."""
    run = inspected.run
    return load.reader(inspected.description, adapter=adapter_of(run), seed=run.seed)


def plan(prepared: Prepared) -> Plan:
    """When things happen."""
    run = prepared.run
    return Plan(
        steps=prepared.steps,
        seed=run.seed,
        max_grad_norm=run.optim.max_grad_norm,
        max_skipped=run.optim.max_skipped_steps,
        log_every=run.tracker.every,
        evaluate_every=run.evaluate.every or 0,
        evaluate_at_start=run.evaluate.at_start,
        checkpoint_every=run.checkpoint.every or 0,
        metric=run.evaluate.metric or _followed(prepared),
        goal=run.evaluate.goal,
    )


def _followed(prepared: Prepared) -> str | None:
    """The metric that "best" follows where none was named."""
    if prepared.run.evaluate.goal == "max":
        return f"{prepared.questions[0].name}/score" if prepared.questions else None
    return f"{prepared.held_out[0].name}/loss" if prepared.held_out else None


def learning_rate(prepared: Prepared) -> Schedule:
    """The schedule over this run's steps."""
    chosen, total = prepared.run.schedule, prepared.steps
    warmup = chosen.warmup_steps
    if warmup is None:
        assert chosen.warmup_fraction is not None  # the schema: exactly one of the two
        warmup = round(total * chosen.warmup_fraction)
    decay = round(total * chosen.decay_fraction) if isinstance(chosen, Wsd) else 0
    return schedule(
        chosen.name,
        lr=prepared.run.optim.lr * prepared.run.protect.lr_scale,
        total=total,
        warmup=warmup,
        min_ratio=getattr(chosen, "min_ratio", 0.0),
        decay=decay,
    )


def uses_adapter(inspected: Inspected) -> bool:
    """Whether the policy without its adapter is the model that training began with."""
    return adapter_of(inspected.run) is not None and inspected.reference is None


def adapter_of(run: Run) -> Mapping[str, Any] | None:
    return None if run.adapter.kind == "full" else run.adapter.model_dump()
