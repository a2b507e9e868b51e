"""Small runs of reinforcement learning with a tiny model, under any strategy, on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from online_toys import judged, packing, prompts

from framework.data.shared import collate_answers
from framework.losses.policy_gradient import ppo
from framework.losses.value import value_loss
from framework.models import actor_critic, load
from framework.rollout.base import Sampling
from framework.rollout.hf import HfRollout
from framework.stages.grpo import Grpo
from framework.stages.online import Online, Plan
from framework.stages.penalty import KlPenalty
from framework.stages.ppo import Estimation, Ppo
from framework.train.meter import Meter
from framework.train.optim import adamw
from framework.train.trainer import accumulate


def structure(directory, *, critic):
    described = load.inspect(str(directory))
    attention = load.attention_for(described, "auto", torch.device("cpu"), precision="fp32")
    policy = load.builder(described, attention=attention, head_chunk_tokens=64)
    weights = load.reader(described)
    if not critic:
        return policy, weights
    scored = load.inspect(str(directory), head="score")
    scorer = load.builder(scored, attention=attention, head_chunk_tokens=64)
    head = load.reader(scored, zero_head=True)
    return actor_critic.builder(policy, scorer), actor_critic.reader(weights, head)


def sampler(world, directory):
    """The real rollout engine, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(directory)
    return HfRollout(
        lambda: AutoModelForCausalLM.from_config(config),
        AutoTokenizer.from_pretrained(directory),
        world,
        dtype=torch.float32,
        batch_size=16,
    )


def strategy_of(name, world):
    if name == "ddp":
        from framework.strategy.ddp import Ddp

        return Ddp(world, precision="fp32")
    if name == "fsdp":
        from framework.strategy.fsdp2 import Fsdp

        return Fsdp(world, precision="fp32")
    from framework.strategy.zero import Zero

    return Zero(world, stage=3, precision="fp32")


def even_share(prompts, completions):
    """How many of an answer's tokens are even: something to learn at once."""
    return judged([sum(t % 2 == 0 for t in c.ids) / len(c.ids) for c in completions])


def stage(
    world, directory, kind, *, name="ddp", reward=even_share, plan=None, loss=None, sharing=False, **options
):
    """(engine, stage) with everything small."""
    critic = kind == "ppo"
    strategy = strategy_of(name, world)
    build, weights = structure(directory, critic=critic)
    optimizer = partial(adamw, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    engine = strategy.train(build, weights, optimizer)
    sampling = options.pop("sampling", Sampling(6, temperature=1.3, samples=1 if critic else 4, seed=11))
    temperature = sampling.temperature
    loss = loss or partial(ppo, clip_low=0.2, clip_high=0.28)
    if critic:
        method = Ppo(
            loss,
            partial(value_loss, clip=0.2),
            temperature=temperature,
            penalty=options.pop("penalty", KlPenalty(0.05, target=1.0, horizon=50)),
            estimation=Estimation(),
            value_scale=0.5,
            critic_warmup=options.pop("critic_warmup", 0),
        )
    else:
        method = Grpo(loss, temperature=temperature)
    reference = None
    if method.wants_reference:
        frozen_build, frozen_weights = structure(directory, critic=False)
        reference = strategy.freeze(frozen_build, frozen_weights)
    return engine, Online(
        engine,
        method,
        plan or Plan(prompts=8 if critic else 3, sequences=6, epochs=2),
        prompts=prompts,
        rollout=sampler(world, directory),
        reward=reward,
        sampling=sampling,
        packing=replace(packing(world), shared=collate_answers if sharing else None),
        seed=3,
        reference=reference,
        **options,
    )


def take(engine, rl, meter, step, *, lr):
    """One optimizer step as the trainer takes it: (loss, gradient norm, rollout reports)."""
    terms = rl.next(step)
    accumulate(engine, terms, seed=7, step=step, meter=meter)
    norm = engine.step(lr=lr, max_grad_norm=1.0)
    line = meter.line()
    return line["loss"], norm, [metrics for kind, metrics in rl.reports() if kind == "rollout"]


def curve(world, directory, kind, *, steps, lr=1e-3, **options):
    """What a run of some steps looks like from outside."""
    engine, rl = stage(world, directory, kind, **options)
    meter = Meter(world)
    taken = [take(engine, rl, meter, step, lr=lr) for step in range(steps)]
    rollouts = [metrics for _, _, reports in taken for metrics in reports]
    return {
        "loss": [loss for loss, _, _ in taken],
        "norm": [norm for _, norm, _ in taken],
        "rollouts": [{k: v for k, v in m.items() if not k.startswith("seconds/")} for m in rollouts],
        "state": rl.state_dict(),
    }


def resumed(world, directory, kind, *, lr=1e-3):
    """Losses of two iterations, the second one twice: straight on, and in a new process's objects."""
    engine, rl = stage(world, directory, kind)
    meter = Meter(world)
    step, first = 0, True
    losses = {False: [], True: []}
    saved = None
    while rl.state_dict()["iteration"] < 2 or not rl.resting:
        if rl.resting and not first:
            shards = engine.state_dict()
            saved = (step, rl.state_dict(), shards)
        first = False
        loss, norm, _ = take(engine, rl, meter, step, lr=lr)
        if saved is not None:
            losses[False].append((loss, norm))
        step += 1
    start, state, shards = saved
    engine, rl = stage(world, directory, kind)

    def read(name, which, begin, end):
        for shard in shards.shards[name]:
            if shard.start <= begin and end <= shard.start + len(shard.values[which]):
                return shard.values[which][begin - shard.start : end - shard.start]
        raise KeyError(name)

    engine.load_state_dict(shards.updates, read)
    rl.load_state_dict(state)
    for again in range(start, step):
        loss, norm, _ = take(engine, rl, meter, again, lr=lr)
        losses[True].append((loss, norm))
    return losses[False], losses[True]


def first_of(wanted):
    """1 where the answer begins with one of the tokens `wanted`."""

    def reward(prompts, completions):
        return judged([float(c.ids[0] in wanted) for c in completions])

    return reward
