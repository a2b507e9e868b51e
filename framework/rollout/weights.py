"""Filling a rollout's own model from a trainer's weights: names, adapters, one rounding.

Weights arrive under the names of the built policy (`lm.`, or `policy.lm.` inside of an actor-critic), whole
and one at a time. A layer with LoRA arrives as base, A and B; what is written is W + scaling B A, computed in
fp32 in a temporary and rounded once, so nothing of the trainer's is ever changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PREFIXES = ("policy.lm.", "lm.")
CRITIC = "critic."
WRAPPER = "base_model.model."  # what peft puts before a model's own names
BASE, LORA_A, LORA_B = "base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"


@torch.no_grad()
def fill(lm: Any, weights: Iterable[tuple[str, Tensor]], *, lora_scaling: float | None = None) -> None:
    """Copy `weights` into the transformers model `lm`, in `lm`'s type and on its device.

    Takes all that `weights` yields. `lora_scaling` is alpha / rank. Raises ValueError for a name that
    `lm` does not have, and when a parameter of `lm` or a third of an adapter did not come.
    """
    parameters = dict(lm.named_parameters())
    filled: set[str] = set()
    layers: dict[str, dict[str, Tensor]] = {}  # adapted layers of which not all has come
    for full_name, tensor in weights:
        if full_name.startswith(CRITIC):
            continue
        prefix = next((p for p in PREFIXES if full_name.startswith(p)), "")
        name = full_name.removeprefix(prefix).removeprefix(WRAPPER)
        part = next((p for p in (BASE, LORA_A, LORA_B) if name.endswith("." + p)), None)
        if part is not None:
            layer = name.removesuffix("." + part)
            came = layers.setdefault(layer, {})
            came[part] = tensor.clone()  # what is yielded is valid until the next one only
            if len(came) < 3:
                continue
            if lora_scaling is None:
                raise ValueError(f"{full_name} is an adapter; give lora_scaling=alpha / rank")
            del layers[layer]
            name, tensor = layer + ".weight", _merged(lm.get_submodule(layer), came, lora_scaling)
        name = name.replace(".base_layer.", ".")
        if name not in parameters:
            raise ValueError(f"{full_name} is no parameter of the rollout's {type(lm).__name__}")
        parameters[name].copy_(tensor)
        filled.add(name)
    absent = sorted((set(parameters) - filled) | set(layers))
    if absent:
        raise ValueError(
            f"the update lacks {len(absent)} parameters of the rollout's model, such as {absent[0]}"
        )


def _merged(layer: Any, came: dict[str, Tensor], scaling: float) -> Tensor:
    """W + scaling B A in fp32; GPT-2's Conv1D keeps its weight as [in, out]."""
    update = (came[LORA_B].float() @ came[LORA_A].float()).mul_(scaling)  # [out, in]
    if type(layer).__name__ == "Conv1D":
        update = update.t()
    return update + came[BASE].float()
