"""From a prepared run to its stage: which objective, which reference, which data, on this rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from framework.batch import Batch, Distribution, Outputs
from framework.config import build, judging, remembering, tabled, vocabulary
from framework.config.build import Inspected, Prepared
from framework.config.stage import ONLINE, Correction, Distill, Grpo, OnPolicy, Ppo, Preference
from framework.data import collate, pack, pairs, shared
from framework.data.loader import SUPERVISED, Cut, Loader, held_out, whole
from framework.data.prompts import Prompts
from framework.data.tables import Table
from framework.losses import sft as token_losses
from framework.losses.correction import sampler_correction
from framework.losses.inputs import has_running_baseline
from framework.losses.value import value_loss
from framework.models.attention import shares_prompts
from framework.rollout import experience
from framework.rollout.base import Rollout
from framework.rollout.experience import Packing
from framework.stages.base import Stage, Term
from framework.stages.coupling import policy_logps
from framework.stages.distill import Distillation, DistillObjective, Teacher
from framework.stages.grpo import Grpo as GrpoMethod
from framework.stages.moving import Moving
from framework.stages.online import Online
from framework.stages.online import Plan as OnlinePlan
from framework.stages.own import Own
from framework.stages.penalty import KlPenalty
from framework.stages.ppo import Estimation
from framework.stages.ppo import Ppo as PpoMethod
from framework.stages.preference import PairObjective
from framework.stages.preference import Preference as PreferenceStage
from framework.stages.reference import AdapterOff, FrozenCopy, Reference, cached
from framework.stages.rehearsal import Rehearsal, Replay
from framework.stages.reward import Reward, RewardObjective
from framework.stages.sft import Supervised, TokenObjective
from framework.stages.unpaired import AnswerObjective, Unpaired
from framework.strategy.base import Engine, World


def build_stage(prepared: Prepared, world: World, engine: Engine, rollout: Rollout | None = None) -> Stage:
    """The run's stage on this rank's share of the data; one that rolls out does so with `rollout`.

    Collective: a reference may be read or asked.
    """
    stage: Stage
    match prepared.run.stage.name:
        case "sft":
            stage = supervised(prepared, world, engine)
        case "distill":
            stage = _distillation(prepared, world, engine, rollout)
        case "reward":
            stage = _reward(prepared, world, engine)
        case "preference" if prepared.unpaired:
            stage = _unpaired(prepared, world, engine)
        case "preference":
            stage = _preference(prepared, world, engine)
        case _:
            assert rollout is not None
            stage = _online(prepared, world, engine, rollout)
    retention = _retention(prepared, world)
    if not (prepared.replay or retention):
        return stage
    return Rehearsal(stage, replay=_replay(prepared, world, engine), retention=retention)


def supervised(prepared: Prepared, world: World, engine: Engine) -> Supervised:
    """Supervised fine-tuning. Collective: the start model may be asked."""
    objective = remembering.mixed(prepared, engine, cut_of(prepared, world))
    sets = held_out_sets(prepared, prepared.held_out, world)
    return Supervised(_loader(prepared, world), objective, sets, remembering.held_out(prepared))


def _distillation(prepared: Prepared, world: World, engine: Engine, rollout: Rollout | None) -> Distillation:
    """The same with a teacher beside the data, and with own answers in it where that is asked for."""
    stage, teacher = prepared.run.stage, prepared.teacher
    assert isinstance(stage, Distill)
    assert teacher is not None
    attention = build.attention_of(prepared, world.device, of=teacher)
    asked = Distribution(
        vocabulary=vocabulary.shared_rows(prepared.description, teacher),
        temperature=stage.temperature,
        likeliest=stage.top_k,
        deferred=stage.top_k is None,
    )
    objective = partial(DistillObjective, prepared.loss, asked, rest=stage.rest, sft_share=stage.sft_share)
    return Distillation(
        _loader(prepared, world),
        objective(sources=[table.name for table in prepared.tables]),
        held_out_sets(prepared, prepared.held_out, world),
        objective(),
        teacher=Teacher(build.build_frozen(prepared, teacher, world, attention=attention), asked),
        own=_own(prepared, engine, rollout) if stage.own_share > 0 else None,
    )


def _own(prepared: Prepared, engine: Engine, rollout: Rollout | None) -> Own:
    run, stage = prepared.run, prepared.run.stage
    assert isinstance(stage, Distill)
    assert rollout is not None
    return Own(
        engine,
        rollout,
        judging.sampling_of(run),
        share=stage.own_share,
        tables=len(run.data.train),
        max_length=run.data.max_length,
        seed=run.seed,
    )


def held_out_sets(
    inspected: Inspected, tables: Sequence[Table], world: World, kind: Any = SUPERVISED
) -> dict[str, list[Any]]:
    """This rank's micro-batches of every held-out set."""
    most, cut = inspected.run.evaluate.max_examples, cut_of(inspected, world)
    return {t.name: held_out(t, max_examples=most, kind=kind, **cut._asdict()) for t in tables}


def cut_of(inspected: Inspected, world: World) -> Cut:
    """How examples become this rank's micro-batches."""
    run = inspected.run
    return Cut(
        run.batch.tokens_per_micro, run.data.packing, world.rank, world.size, inspected.description.pad_id
    )


def packing_of(inspected: Inspected, world: World) -> Packing:
    """How generated answers become this rank's micro-batches."""
    run, pad_id = inspected.run, inspected.description.pad_id
    packing = run.data.packing
    sharing = packing and shares_prompts(build.attention_of(inspected, world.device))

    def collated(examples: Sequence[Any]) -> Batch:
        return collate.collate(examples, [0] * len(examples), packing=packing, pad_id=pad_id)

    return Packing(
        plan=partial(
            pack.plan, tokens_per_micro=run.batch.tokens_per_micro, ranks=world.size, packing=packing
        ),
        collate=collated,
        fill=partial(collate.fill, packing=packing, pad_id=pad_id),
        tokens_per_micro=run.batch.tokens_per_micro,
        rank=world.rank,
        shared=shared.collate_answers if sharing else None,
    )


def _loader(prepared: Prepared, world: World, **kinds: Any) -> Loader:
    sequences = prepared.run.batch.sequences
    cut = cut_of(prepared, world)._asdict()
    return Loader(prepared.tables, prepared.mixture, sequences=sequences, **cut, **kinds)


def _replay(prepared: Prepared, world: World, engine: Engine) -> Replay | None:
    """General text as a term of its own."""
    chosen = prepared.run.replay
    if chosen.scale is None:
        return None
    assert chosen.sequences is not None  # the schema: both or none
    mixture = tabled.apart(prepared.replay, seed=prepared.run.seed)
    loader = Loader(prepared.replay, mixture, sequences=chosen.sequences, **cut_of(prepared, world)._asdict())
    return Replay(
        loader,
        remembering.alone(prepared, engine, cut_of(prepared, world)),
        chosen.scale,
        chosen.scale_by == "gradient",
    )


def _retention(prepared: Prepared, world: World) -> Mapping[str, Term]:
    """General text to watch: its plain cross-entropy, whatever the stage's loss is.

    A reward model writes nothing, so it has nothing to forget of that.
    """
    if prepared.run.stage.name == "reward":
        return {}
    sets = held_out_sets(prepared, prepared.retention, world)
    return {name: Term(TokenObjective(token_losses.sft), micros) for name, micros in sets.items()}


# ----- judged answers


def _pairs(prepared: Prepared, world: World, *, scored: bool = False) -> pairs.Pairs:
    packing = prepared.run.data.packing
    return pairs.Pairs(
        sharing=packing and shares_prompts(build.attention_of(prepared, world.device)), scored=scored
    )


def _reward(prepared: Prepared, world: World, engine: Engine) -> Reward:
    kind = _pairs(prepared, world, scored=True)
    sets = held_out_sets(prepared, prepared.held_out, world, kind)
    return Reward(_loader(prepared, world, kind=kind), RewardObjective(prepared.loss), sets, engine=engine)


def _preference(prepared: Prepared, world: World, engine: Engine) -> PreferenceStage:
    stage = prepared.run.stage
    assert isinstance(stage, Preference)
    kind = _pairs(prepared, world)
    objective = PairObjective(prepared.loss, ld_alpha=stage.ld_alpha, wpo=stage.wpo)
    reference = _reference(prepared, world, engine, kind) if "reference" in objective.inputs else None
    moving = None
    if stage.sync_every is not None and isinstance(reference, FrozenCopy):
        moving = Moving(
            reference.frozen,
            engine,
            every=stage.sync_every,
            mix=stage.sync_mix,
            directory=Path(prepared.run.run_dir) / "reference",
            keep=prepared.run.checkpoint.keep,
        )
    return PreferenceStage(
        _loader(prepared, world, kind=kind),
        objective,
        held_out_sets(prepared, prepared.held_out, world, kind),
        engine=engine,
        reference=reference,
        moving=moving,
    )


def _unpaired(prepared: Prepared, world: World, engine: Engine) -> Unpaired:
    objective = AnswerObjective(prepared.loss)
    running = has_running_baseline(prepared.loss)
    kinds: dict[str, Any] = {"kind": pairs.Labelled()}
    if "baseline" in objective.inputs and not running:
        kinds["mismatched"] = pairs.Mismatched(prepared.run.data.max_length)
    cut, most = cut_of(prepared, world), prepared.run.evaluate.max_examples
    wanted = objective.inputs & {"reference", "baseline"}
    return Unpaired(
        _loader(prepared, world, **kinds),
        objective,
        {t.name: whole(t, cut, max_examples=most, **kinds) for t in prepared.held_out},
        engine=engine,
        reference=_reference(prepared, world, engine, kinds["kind"]) if wanted else None,
        baseline="running" if running else "mismatched",
        beta=prepared.run.loss.keywords.get("beta", 1.0),
    )


def _reference(prepared: Prepared, world: World, engine: Engine, kind: Any) -> Reference:
    """Who answers for the start model."""
    stage = prepared.run.stage
    assert isinstance(stage, Preference)
    another = prepared.reference
    if stage.reference == "adapter" or (stage.reference == "auto" and build.uses_adapter(prepared)):
        return AdapterOff(engine)
    if stage.reference != "cached":
        return FrozenCopy(build.build_frozen(prepared, another or prepared.description, world))
    ask: Reference = partial(policy_logps, engine)  # holds the start weights until training begins
    if another is not None:
        ask = FrozenCopy(build.build_frozen(prepared, another, world))

    def every_row() -> Iterator[Any]:
        for table in (*prepared.tables, *prepared.held_out):
            yield from held_out(table, kind=kind, **cut_of(prepared, world)._asdict())

    run = prepared.run
    identity = {
        "model": (another or prepared.description).fingerprint,
        "tables": [table.fingerprint for table in (*prepared.tables, *prepared.held_out)],
        "precision": run.precision,
        "attention": build.attention_of(prepared, world.device),
    }
    if run.adapter.kind == "qlora" and another is None:
        identity["double_quantisation"] = run.adapter.double_quantisation
    return cached(Path(run.data.cache_dir) / "reference", identity, every_row(), ask=ask, world=world)


# ----- reinforcement learning


def _online(prepared: Prepared, world: World, engine: Engine, rollout: Rollout) -> Online:
    run, stage, sampling = prepared.run, prepared.run.stage, judging.sampling_of(prepared.run)
    assert isinstance(stage, OnPolicy)
    assert stage.name in ONLINE
    packing = packing_of(prepared, world)
    penalty = KlPenalty(stage.kl_coefficient, stage.kl_estimator, stage.kl_target, stage.kl_horizon)
    method: PpoMethod | GrpoMethod
    if isinstance(stage, Ppo):
        method = PpoMethod(
            prepared.loss,
            partial(value_loss, clip=stage.value_clip),
            temperature=sampling.temperature,
            penalty=penalty,
            estimation=Estimation(
                gamma=stage.gamma,
                gae_lambda=stage.gae_lambda,
                whiten_rewards=stage.whiten_rewards,
                whiten_advantages=stage.whiten_advantages,
            ),
            value_scale=stage.value_scale,
            critic_warmup=stage.critic_warmup,
        )
    else:
        assert isinstance(stage, Grpo)
        method = GrpoMethod(
            prepared.loss, temperature=sampling.temperature, advantages=stage.advantages, penalty=penalty
        )
    return Online(
        engine,
        method,
        OnlinePlan(
            prompts=stage.prompts,
            sequences=run.batch.sequences,
            epochs=stage.epochs,
            averaging=stage.averaging,
            extra_prompts=stage.extra_prompts,
            mask_truncated=stage.mask_truncated,
            max_failed_share=run.reward.max_failed,
            stop_kl=stage.stop_kl,
            shown=run.evaluate.samples,
        ),
        prompts=Prompts(prepared.tables, seed=run.seed, shuffle=run.data.shuffle).take,  # type: ignore[arg-type]
        rollout=rollout,
        reward=judging.build_reward(prepared, world, packing),
        sampling=sampling,
        packing=packing,
        seed=run.seed,
        shaping=experience.Shaping(**stage.shaping.model_dump()),
        correction=_correction(stage.correction),
        reference=_start_model(prepared, world, engine) if method.wants_reference else None,
        decode=partial(prepared.description.tokenizer.decode, skip_special_tokens=True),
    )


def _correction(chosen: Correction) -> Any:
    return None if chosen.level == "none" else partial(sampler_correction, **chosen.model_dump())


def _start_model(prepared: Prepared, world: World, engine: Engine) -> Any:
    """Answers like the engine for the start model."""
    stage = prepared.run.stage
    assert isinstance(stage, OnPolicy)
    if stage.reference == "adapter" or (stage.reference == "auto" and build.uses_adapter(prepared)):

        def without_adapter(batch: Batch, **options: Any) -> Outputs:
            answer: Outputs = engine(batch, adapter=False, **options)
            return answer

        return without_adapter
    return build.build_frozen(prepared, prepared.reference or prepared.description, world)
