"""Ways of spreading a model that the rest of the tree rules out, each with the nearest that works.

Asked by the schema, so that a run is refused before anything heavy starts; imports no torch.
"""

from __future__ import annotations

from framework.config.nodes import Launch, refuse
from framework.config.strategy import Hsdp, Spread


def check(strategy: Spread, launch: Launch) -> None:
    """Raises a refusal unless `strategy` can spread a model over the ranks of `launch`."""
    if isinstance(strategy, Hsdp):
        _hsdp(strategy, launch)


def _hsdp(strategy: Hsdp, launch: Launch) -> None:
    if strategy.shard_size == 1:
        raise refuse(
            "strategy.shard_size",
            "a whole copy of the model on every rank",
            "two or more ranks to share a copy",
            "strategy=ddp",
        )
    if strategy.shard_size is not None:
        _divides("strategy.shard_size", strategy.shard_size, launch, otherwise="strategy=fsdp")


def _divides(key: str, size: int, launch: Launch, *, otherwise: str) -> None:
    """Refuse groups of `size` ranks that the world does not divide into; names the nearest that it does."""
    world = launch.nproc * launch.nnodes
    if world % size == 0:
        return
    divisors = [divisor for divisor in range(2, world + 1) if world % divisor == 0]
    near = [d for d in divisors if d < size][-1:] + [d for d in divisors if d > size][:1]
    raise refuse(
        f"{key}, launch.nproc",
        f"{world} {'rank' if world == 1 else 'ranks'} in groups of {size}",
        f"a size that divides {world}" if near else "two or more ranks",
        " or ".join([f"{key}={divisor}" for divisor in near] or [otherwise]),
    )
