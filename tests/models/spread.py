"""A tiny actor and critic on any strategy, for tests that run on several ranks."""

import functools
from functools import partial

import torch
from rows import batch, segments

from framework.models import actor_critic, load
from framework.strategy.ddp import Ddp
from framework.strategy.fsdp2 import Fsdp
from framework.strategy.memory import PLAIN
from framework.strategy.zero import Zero
from framework.train.optim import adamw

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"}
STRATEGIES = {
    "ddp": Ddp,
    "fsdp": Fsdp,
    "fsdp-kept": partial(Fsdp, reshard_after_forward=False),
    "hsdp": partial(Fsdp, shards=2),
    "fsdp_offload": partial(Fsdp, offload=True),
    "zero1": partial(Zero, stage=1),
    "zero2": partial(Zero, stage=2),
    "zero3": partial(Zero, stage=3),
}
OPTIMIZER = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.0}
VALUES = frozenset({"values"})


inspect = functools.cache(load.inspect)


def model(path, *, adapter=None, head="lm"):
    """(build, weights) of one model."""
    description = inspect(str(path), head=head)
    build = load.builder(description, attention="sapwood", head_chunk_tokens=8, adapter=adapter)
    return build, load.reader(description, adapter=adapter)


def both(path, *, adapter=None):
    """(build, weights) of a policy and a critic with heads that are not zero."""
    actor, critic = model(path, adapter=adapter), model(path, adapter=adapter, head="score")
    return actor_critic.builder(actor[0], critic[0]), actor_critic.reader(actor[1], critic[1])


def engine(world, name, path, *, precision="fp32", adapter=None, scale=2.0, blocks=PLAIN):
    optimizer = partial(adamw, **OPTIMIZER, lr_scales={"critic.": scale})
    return STRATEGIES[name](world, precision=precision, blocks=blocks).train(
        *both(path, adapter=adapter), optimizer
    )


def shares(world, step, micros=2):
    """This rank's micro-batches of a step: six rows of 5 to 20 tokens, dealt out the same for any cut."""
    lengths = [5, 20, 7, 11, 9, 16]
    rows = segments(lengths, 400, seed=10 + step)
    places = world.size * micros
    mine = [rows[world.rank * micros + micro :: places] for micro in range(micros)]
    return [batch(share) for share in mine]


def loss_of(engine, batch, needs):
    """Smooth in both answers; what is left out, the critic or (`needs` None) the policy, adds nothing."""
    if needs is None:
        return (engine(batch, actor=False).scores - 1).square().sum() / 60
    outputs = engine(batch, needs=needs)
    policy = -outputs.logps.sum() / 60
    return policy if outputs.values is None else policy + (outputs.values - 1).square().sum() / 60


def step(engine, number, *, needs=(VALUES, VALUES), lr=1e-3):
    """One optimizer step of four micro-batches on one rank and two on each of two; the norm.

    `needs` of each rank's first and second micro-batch.
    """
    world = engine.world
    needs = [wanted for _ in range(2 // world.size) for wanted in needs]
    batches = shares(world, number, len(needs))
    for micro, (each, wanted) in enumerate(zip(batches, needs, strict=True)):
        torch.manual_seed(100 * number + 10 * world.rank + micro)
        with engine.micro(last=micro == len(needs) - 1):
            engine.backward(loss_of(engine, each, wanted))
    return engine.step(lr=lr, max_grad_norm=None)


def copied(weights):
    """What an engine yields, to keep."""
    return {name: tensor.detach().float().clone() for name, tensor in weights}
