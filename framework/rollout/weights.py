"""Filling a rollout's own model from a trainer's weights: names, adapters, one rounding.

Weights arrive under the names of the built policy (`lm.`, or `policy.lm.` inside of an actor-critic), whole
and one at a time. A layer with LoRA arrives as base, A and B; what is written is W + scaling B A, computed in
fp32 in a temporary and rounded once, so nothing of the trainer's is ever changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from framework.rollout.base import CRITIC

PREFIXES = ("policy.lm.", "lm.")
WRAPPER = "base_model.model."  # what peft puts before a model's own names
BASE, LORA_A, LORA_B = "base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"


@torch.no_grad()
def fill(lm: Any, weights: Iterable[tuple[str, Tensor]], *, lora_scaling: float | None = None) -> None:
    """Copy `weights` into the transformers model `lm`, in `lm`'s type and on its device.

    Takes all that `weights` yields; see `plain`. Raises ValueError for a name that `lm` does not have, and
    when a parameter of `lm` did not come.
    """
    parameters = dict(lm.named_parameters())
    absent = set(parameters)
    # GPT-2's Conv1D keeps its weight as [in, out]
    turned = {name for name, module in lm.named_modules() if type(module).__name__ == "Conv1D"}
    for name, tensor in plain(weights, lora_scaling=lora_scaling, turned=turned):
        if name not in parameters:
            raise ValueError(f"the update's {name} is no parameter of the rollout's {type(lm).__name__}")
        parameters[name].copy_(tensor)
        absent.discard(name)
    if absent:
        raise ValueError(
            f"the update lacks {len(absent)} parameters of the rollout's model, such as {min(absent)}"
        )


def plain(
    weights: Iterable[tuple[str, Tensor]],
    *,
    lora_scaling: float | None = None,
    turned: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """(name in the transformers model, tensor) of a policy's weights: adapters merged in fp32, no critic.

    `lora_scaling` is alpha / rank; `turned` are layers whose weight is [in, out]. A tensor is valid until
    the next one is asked for. Raises ValueError when a third of an adapter did not come.
    """
    layers: dict[str, dict[str, Tensor]] = {}  # adapted layers of which not all has come
    for full_name, tensor in weights:
        if full_name.startswith(CRITIC):
            continue
        prefix = next((p for p in PREFIXES if full_name.startswith(p)), "")
        name = full_name.removeprefix(prefix).removeprefix(WRAPPER)
        part = next((p for p in (BASE, LORA_A, LORA_B) if name.endswith("." + p)), None)
        if part is None:
            yield name.replace(".base_layer.", "."), tensor
            continue
        layer = name.removesuffix("." + part)
        came = layers.setdefault(layer, {})
        came[part] = tensor.clone()  # what is yielded is valid until the next one only
        if len(came) == 3:
            if lora_scaling is None:
                raise ValueError(f"{full_name} is an adapter; give lora_scaling=alpha / rank")
            del layers[layer]
            update = (came[LORA_B].float() @ came[LORA_A].float()).mul_(lora_scaling)  # [out, in]
            yield layer + ".weight", (update.t() if layer in turned else update) + came[BASE].float()
    if layers:
        raise ValueError(f"the update lacks parts of {len(layers)} adapters, such as that of {min(layers)}")
