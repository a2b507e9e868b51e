"""The optimizer: AdamW over two groups, decayed and not. Knows no strategy: it gets named parameters.

Learning rates are set by the engine before every update (schedule(step) * group["lr_scale"]), so a
group here carries only what does not change.
"""

from __future__ import annotations

from collections.abc import Iterable

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
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, decoupled decay) over (name, parameter) pairs.

    Every parameter shows its whole shape, however its strategy stores it. Empty groups are left out,
    since some engines cannot hold them.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        (decayed if decays(name, parameter.dim()) else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    # fused: one pass over memory, several times faster than a loop over parameters also on a CPU
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
