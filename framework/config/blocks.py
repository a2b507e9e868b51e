"""From a validated run to how its blocks are computed on a device."""

from __future__ import annotations

import torch

from framework.config.schema import Run
from framework.errors import ConfigError
from framework.strategy.compiled import check_compiler
from framework.strategy.fp8 import Fp8, check_fp8
from framework.strategy.memory import Blocks


def blocks_of(run: Run, device: torch.device) -> Blocks:
    """Raises ConfigError for what `device` cannot do."""
    model = run.model
    if model.activation_offload and device.type == "cpu":
        raise ConfigError(
            "model.activation_offload=true: the run computes on a CPU, whose memory has its activations "
            "already; type model.activation_offload=false, or model.activation_checkpointing=full for less"
        )
    if model.compile == "blocks":
        check_compiler(device)
    fp8 = None if model.fp8 is None else Fp8(model.fp8, emulate=model.fp8_emulate)
    if fp8:
        check_fp8(fp8, device)
    return Blocks(
        checkpointing=model.activation_checkpointing,
        offload=model.activation_offload,
        compiled=model.compile == "blocks",
        fp8=fp8,
    )
