"""From a validated run to the strategy that spreads its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from framework.config import pairs
from framework.config import strategy as kinds
from framework.config.blocks import blocks_of
from framework.config.schema import Run
from framework.strategy.base import Strategy, World


def build_strategy(run: Run, world: World) -> Strategy:
    """How the model is spread. Each strategy's libraries are imported only when it is chosen.

    Raises ConfigError for what the device of `world` cannot do.
    """
    chosen = run.strategy
    pairs.check_device(run, world.device.type)
    common: dict[str, Any] = {"precision": run.precision, "blocks": blocks_of(run, world.device)}
    match chosen:
        case kinds.Ddp():
            from framework.strategy.ddp import Ddp

            return Ddp(world, **common)
        case kinds.Fsdp() | kinds.Hsdp():
            from framework.strategy.fsdp2 import Fsdp

            if isinstance(chosen, kinds.Hsdp):
                common["shards"] = chosen.shard_size or "host"
            return Fsdp(world, **common, reshard_after_forward=chosen.reshard_after_forward)
        case kinds.FsdpOffload():
            from framework.strategy.fsdp2 import Fsdp

            return Fsdp(world, **common, offload=True)
        case kinds.Zero1() | kinds.Zero2() | kinds.Zero3():
            from framework.strategy.zero import Zero

            return Zero(world, stage=int(chosen.name[-1]), **common)
        case kinds.Zero3Offload():
            from framework.strategy.zero import Offload, Zero

            directory = None if chosen.nvme_path is None else Path(chosen.nvme_path)
            offload = Offload(chosen.optimizer, chosen.parameters, directory, pinned=chosen.pin_memory)
            return Zero(world, options=offload, **common)
        case kinds.ZeroPlusPlus():
            from framework.strategy.zero import PlusPlus, Zero

            less = PlusPlus(
                shards=chosen.shard_size or "host",
                quantized_weights=chosen.quantized_weights,
                quantized_gradients=chosen.quantized_gradients,
            )
            return Zero(world, options=less, **common)
