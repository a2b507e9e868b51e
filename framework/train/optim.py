"""The optimizer: AdamW over groups that differ in decay and rate. Knows no strategy, only named parameters.

Learning rates are set by the engine before every update (schedule(step) * group["lr_scale"]), so a
group here carries only what does not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def decays(name: str, dimensions: int) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases or embeddings.

    Decaying an embedding shrinks the rows of tokens that the data never shows, which is forgetting
    with no gradient to resist it.
    """
    return dimensions >= 2 and "embed" not in name and not name.endswith((".wte.weight", ".wpe.weight"))


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, decoupled decay) over (name, parameter) pairs.

    Every parameter shows its whole shape, however its strategy stores it. `lr_scales` multiplies the
    learning rate of parameters whose names begin so, such as {"critic.": 10.0}; the longest beginning
    counts. Empty groups are left out, since some engines cannot hold them.
    """
    scales = {"": 1.0} | dict(lr_scales or {})
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        scale = scales[max((prefix for prefix in scales if name.startswith(prefix)), key=len)]
        groups.setdefault((scale, not decays(name, parameter.dim())), []).append(parameter)
    listed: list[dict[str, Any]] = [
        {"params": groups[scale, plain], "weight_decay": 0.0 if plain else weight_decay, "lr_scale": scale}
        for scale, plain in sorted(groups)
    ]
    # fused: one pass over memory, several times faster than a loop over parameters also on a CPU
    return torch.optim.AdamW(listed, lr=0.0, betas=betas, eps=eps, fused=True)
