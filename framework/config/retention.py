"""From what is to be watched to what watches it: the probe's micro-batches on this rank, and its scores.

The probe is cut into micro-batches without regard to the world and then dealt out, so the same rows pass
through the model together on 1 rank and on 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from framework.batch import Batch
from framework.config import build
from framework.config.build import Prepared
from framework.config.probes import Probes
from framework.config.questions import build_questions
from framework.config.steering import Steering
from framework.data import cache, collate, pack
from framework.rollout.base import Rollout
from framework.stages.against import AgainstStart
from framework.strategy.base import Engine, World
from framework.train.retain import Probe, Retention, Stratum, relative

MICRO_TOKENS = 2048  # of the probe at once: small, so that there is some for every rank


def build_watch(
    prepared: Prepared, world: World, engine: Engine, stage: Any, rollout: Rollout | None = None
) -> Retention | None:
    """What watches the run, and steers `stage` where a budget was set; None where nothing is watched.

    `rollout` answers questions, where there are any.
    """
    probes = prepared.probes
    if probes is None:
        return None
    most = min(MICRO_TOKENS, prepared.run.batch.tokens_per_micro)
    scoring = {
        "precision": prepared.run.precision,
        "attention": build.attention_of(prepared, world.device),
    }
    strata, at = [], 0
    for stratum in probes.strata:
        identity = cache.fingerprint({"rows": stratum.identity, **scoring})
        strata.append(Stratum(stratum.name, range(at, at + len(stratum.rows)), identity))
        at += len(stratum.rows)
    probe = Probe(
        strata,
        _micros(prepared, probes, world, tokens_per_micro=most),
        _micros(prepared, probes, world, tokens_per_micro=max(most // 2, 1)),
    )
    told = [("event", {"message": probes.told()})]
    decide = None
    if prepared.run.replay.max_forgetting is not None and probes.budgeted:
        replay = prepared.run.replay
        steer = stage.steer if replay.sources else None
        rate = build.learning_rate(prepared)
        looks = probes.cadence.looks()
        if replay.unit == "accuracy":  # steered by askings alone
            looks //= prepared.run.retain.ask_every
        landing = max(looks, 1) if prepared.run.protect.interpolate == "budget" else 0
        decide = Steering(
            replay, probes.budgeted, steer, world, steps=prepared.steps, rate=rate, landing_in=landing
        )
    objective = AgainstStart(vocabulary=prepared.description.vocab_size)
    questions = build_questions(prepared, world, engine, rollout)
    return Retention(engine, probe, objective, probes.cadence, questions=questions, decide=decide, told=told)


def _micros(prepared: Prepared, probes: Probes, world: World, *, tokens_per_micro: int) -> Sequence[Batch]:
    """This rank's part of all strata's rows, numbered through."""
    packing, pad_id = prepared.run.data.packing, prepared.description.pad_id
    examples = [stratum.table.example(row) for stratum in probes.strata for row in stratum.rows]
    if not examples:
        return []
    lengths = [len(ids) for ids, _ in examples]
    (cut,) = pack.plan(lengths, tokens_per_micro=tokens_per_micro, ranks=1, packing=packing)
    cut += [[] for _ in range(-len(cut) % world.size)]
    return [
        collate.collate([examples[i] for i in chosen], chosen, packing=packing, pad_id=pad_id)
        if chosen
        else collate.fill(packing=packing, pad_id=pad_id)
        for chosen in cut[world.rank :: world.size]
    ]


def summary(watch: Retention | None) -> dict[str, Any]:
    """What `result.json` says of the last look: by stratum, nats and the relative form; and of the budget."""
    if watch is None:
        return {"retention": {}}
    retained = {
        name: {
            "change": found.change,
            "low": found.low,
            "high": found.high,
            "relative": relative(found.change),
            "relative_high": relative(found.high),
            "noise": watch.noise[name],
            "kl": watch.divergences[name].change if name in watch.divergences else None,
            "rows": found.rows,
        }
        for name, found in watch.latest.items()
    }
    judged = watch.decide.judged if isinstance(watch.decide, Steering) else {}
    answered = {name: {**vars(fall), "fall": fall.change} for name, fall in watch.falls.items()}
    return {
        "retention": retained,
        **({"answers": answered} if answered else {}),
        **({"budget": judged} if judged else {}),
    }
