"""Low-rank adapters through peft: its structure, its names, its file format. The only home of peft.

LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen weight W becomes W + (alpha / rank) B A, with
A [rank, in] drawn at random and B [out, rank] zero, so that training starts from the model as it was.

DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) trains direction and length apart: each row of W + (alpha /
rank) B A is brought to a length of its own, which starts as that of the row of W.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import ModelError
from framework.keyed import key

DEFAULT = "default"  # peft's name for the one adapter of a model; part of its parameters' names


@dataclass(frozen=True)
class Lora:
    """The shape of the adapters. `targets` is "all-linear" (all but the head) or module names."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    kind: str = "lora"  # or "dora", or "qlora": beside weights that `models.nf4` holds in four bits
    double_quantisation: bool = False  # of those weights: their scales are quantised, too

    def peft_config(self, *, excluded: Sequence[str] | None = None) -> Any:
        """The same in peft's words; with modules `excluded` it is no language model's any more."""
        from peft import LoraConfig, TaskType

        return LoraConfig(
            task_type=None if excluded else TaskType.CAUSAL_LM,
            exclude_modules=list(excluded) if excluded else None,
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft divides it by the rank
            lora_dropout=self.dropout,
            use_dora=self.kind == "dora",
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
        )


def of(adapter: Lora | Mapping[str, Any] | None) -> Lora | None:
    """The adapter that a run's configuration describes; None for full training."""
    return Lora(**adapter) if isinstance(adapter, Mapping) else adapter


def attach(lm: nn.Module, adapter: Lora, *, excluded: Sequence[str] | None = None) -> nn.Module:
    """The peft model around `lm`, in which adapters alone are trained, in the type of their layer.

    Modules named in `excluded` (a head that scores) get none. Raises ModelError when no module has a name
    in `targets`.
    """
    from peft import get_peft_model

    try:
        return get_peft_model(lm, adapter.peft_config(excluded=excluded), autocast_adapter_dtype=False)
    except ValueError as error:
        linear = {n.rpartition(".")[2] for n, m in lm.named_modules() if isinstance(m, nn.Linear)}
        raise ModelError(
            f"adapter.targets={adapter.targets} does not fit this model: {error}. "
            f"Type adapter.targets=all-linear or some of [{', '.join(sorted(linear))}]"
        ) from error


@contextlib.contextmanager
def without(lm: nn.Module) -> Iterator[None]:
    """The frozen model alone answers inside. For forward passes without gradients.

    Only the layers' switch is thrown. peft's own way also stops the adapters' parameters from asking for
    gradients and starts them again, and by then a sharding strategy may have put others in their place.
    Raises ValueError where there is no adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError("adapter=False, but the model has no adapter: it would answer as what is trained")
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def is_adapter(name: str) -> bool:
    """Whether a parameter name of a peft model belongs to an adapter."""
    return f".{DEFAULT}." in name and ".lora_" in name


def is_inner(name: str) -> bool:
    """Whether a parameter is an A, which alone changes nothing: an update B A is linear in B."""
    return ".lora_A." in name or ".lora_embedding_A." in name


def initial(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The first value of an adapter's parameter in fp32, a pure function of its name, shape and `seed`.

    A is uniform within 1 / sqrt(in), as peft draws it; B is zero. So a run begins with the same
    numbers under every strategy.
    """
    if not is_inner(name):
        return torch.zeros(*shape)
    generator = torch.Generator().manual_seed(key(seed, "adapter", name))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def is_magnitude(name: str) -> bool:
    """Whether a parameter of an adapter holds the lengths of rows (DoRA)."""
    return ".lora_magnitude_vector." in name


def magnitudes(lm: nn.Module, name: str) -> Tensor:
    """[out] fp32, the first value of the parameter `name`: the lengths of the rows of its layer's weight."""
    base: Any = lm.get_submodule(name.partition(".lora_magnitude_vector.")[0]).base_layer
    weight = base.weight.detach().float()
    return torch.linalg.vector_norm(weight, dim=0 if type(base).__name__ == "Conv1D" else 1)


def base_name(name: str) -> str | None:
    """The frozen model's own name of a peft parameter (`base_model.model. ... .base_layer.weight`)."""
    if is_adapter(name):
        return None
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def merged(lm: Any) -> Any:
    """The plain model with W + (alpha / rank) B A in place of W. `lm` must be in fp32: in bf16 most of
    the update would be rounded away."""
    if any(p.dtype != torch.float32 for p in lm.parameters()):
        raise ValueError("adapters are merged in fp32 only")
    return lm.merge_and_unload()


def save(lm: Any, directory: Path, *, base: str) -> None:
    """The adapters of a peft model in peft's own format; `base` is where the frozen model comes from."""
    for config in lm.peft_config.values():
        config.base_model_name_or_path = base
        config.inference_mode = True
    # embedding layers are never trained here; without this peft asks the network whether they grew
    lm.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # a form with nothing filled in


def reload(lm: nn.Module, directory: Path) -> Any:
    """A peft model of `lm` and the adapters in `directory`, as any user of peft gets it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(lm, directory, autocast_adapter_dtype=False)


def parameters(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapters' parameters of a peft model."""
    return ((name, p) for name, p in lm.named_parameters() if is_adapter(name))
