"""From a validated run to which layers multiply in 8-bit floats: known from configurations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from framework.config.dry_run import structure
from framework.errors import ModelError
from framework.models import load
from framework.strategy.fp8 import MULTIPLE, check_package, linear_layers

if TYPE_CHECKING:
    from framework.config.build import Inspected


@dataclass(frozen=True)
class Reach:
    """Linear layers of the blocks of all that is trained: how many are converted, which stay as they are."""

    converted: int
    left: tuple[str, ...]


def reach(inspected: Inspected) -> Reach:
    """Raises ModelError where no layer can be converted, and for mixtures of experts.

    Their products, of no linear layer, would stay as they are, and the choice of experts would be rounded.
    """
    converted, left = 0, []
    for description in (inspected.description, inspected.critic):
        if description is None:
            continue
        build = load.builder(description, attention="eager", head_chunk_tokens=1)
        here = 0
        for number, block in enumerate(structure(build, torch.float32).blocks()):  # type: ignore[operator]
            for name, parameter in block.named_parameters():
                if parameter.dim() > 2 or ".experts." in name:
                    raise _refusal(description, f"found a mixture of experts ({name})")
            for name, _, fits in linear_layers(block):
                here += fits
                left += [] if fits else [f"{number}.{name}"]
        if not here:
            raise _refusal(
                description,
                f"found no linear layer in its blocks whose dimensions are multiples of {MULTIPLE}",
            )
        converted += here
    return Reach(converted, tuple(left))


def check(inspected: Inspected) -> None:
    """Raises ConfigError or ModelError for what could not be trained with `model.fp8` on any device."""
    if inspected.run.model.fp8 is not None:
        check_package()
        reach(inspected)


def told(inspected: Inspected) -> str | None:
    """What a run's record says of it."""
    model = inspected.run.model
    if model.fp8 is None:
        return None
    found = reach(inspected)
    said = f"fp8 ({model.fp8}{', emulated' if model.fp8_emulate else ''}): {found.converted} linear layers"
    if found.left:
        said += (
            f"; {len(found.left)} stay in {inspected.run.precision}, whose dimensions are no multiples of "
            f"{MULTIPLE}, such as {found.left[0]}"
        )
    return said


def _refusal(description: load.Description, found: str) -> ModelError:
    kind = description.config.model_type
    return ModelError(
        f"model.fp8: {found} in a model of type {kind}; expected a dense model with linear layers; "
        "type model.fp8=null"
    )
