"""Weighted sums of preference losses in plain values, such as MPO: no function has to be written for one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from framework.losses.answers import Answers
from framework.losses.apo import apo_down, apo_zero
from framework.losses.bco import bco_pair, nca_pair
from framework.losses.discopop import discopop
from framework.losses.dpo import dpo, dpo_norm, hinge, odpo, robust
from framework.losses.exo import exo
from framework.losses.inputs import Settings, inputs, optional
from framework.losses.ipo import ipo
from framework.losses.items import Items
from framework.losses.orpo import orpo
from framework.losses.sft import chosen_sft
from framework.losses.simpo import alphapo, cpo, simpo
from framework.losses.sppo import sppo

PARTS: Mapping[str, Callable[..., Items]] = {
    "alphapo": alphapo,
    "apo_down": apo_down,
    "apo_zero": apo_zero,
    "bco_pair": bco_pair,
    "cpo": cpo,
    "discopop": discopop,
    "dpo": dpo,
    "dpo_norm": dpo_norm,
    "exo": exo,
    "hinge": hinge,
    "ipo": ipo,
    "nca_pair": nca_pair,
    "odpo": odpo,
    "orpo": orpo,
    "robust": robust,
    "sft": chosen_sft,
    "simpo": simpo,
    "sppo": sppo,
}
"""What can be named in a mixture. AOT cannot: its pairs are matched over the batch by one reward."""


def _any_part_reads(name: str) -> Callable[[Settings], bool]:
    return lambda settings: any(name in inputs(PARTS[part]) for part in settings["losses"] if part in PARTS)


@optional(**{name: _any_part_reads(name) for name in ("reference", "margin", "tokens_per_pair")})
def mixed(
    policy: Answers,
    weight: Tensor,
    reference: Answers | None = None,
    margin: Tensor | None = None,
    tokens_per_pair: float | None = None,
    *,
    losses: Mapping[str, float],
    keywords: Mapping[str, Mapping[str, Any]] | None = None,
) -> Items:
    """sum_j a_j L_j: `losses` gives the coefficient a_j > 0 of each loss L_j of `PARTS`, by its name.

    `keywords` gives each its settings, by the same name. {dpo: 0.8, bco_pair: 0.2, sft: 1.0} is MPO (Wang et
    al. 2024, arXiv 2411.10442); a single loss of coefficient 1 is that loss. `reference`,
    `margin` and `tokens_per_pair` are needed where a part reads them. Metrics are those of the first part
    that reports each, and every part's loss as "loss/<name>". Raises ValueError for an unknown name, a
    coefficient outside its range, a missing input or a keyword that does not fit.
    """
    _refuse(losses, keywords or {})
    given: dict[str, Any] = {"policy": policy, "weight": weight, "reference": reference}
    given |= {"margin": margin, "tokens_per_pair": tokens_per_pair}
    total = torch.zeros_like(weight, dtype=policy.chosen.dtype)
    metrics: dict[str, Tensor] = {}
    for name, coefficient in losses.items():
        wanted = {key: given[key] for key in inputs(PARTS[name])}
        missing = [key for key, value in wanted.items() if value is None]
        if missing:
            raise ValueError(f"losses.{name} needs {', '.join(missing)}")
        items = PARTS[name](**wanted, **(keywords or {}).get(name, {}))
        total = total + coefficient * items.loss
        metrics = {**items.metrics, **metrics, f"loss/{name}": items.loss.detach()}
    return Items(total, weight, metrics)


def _refuse(losses: Mapping[str, float], keywords: Mapping[str, Mapping[str, Any]]) -> None:
    if not losses:
        raise ValueError(f"losses is empty; expected some of {', '.join(PARTS)}")
    for name, coefficient in losses.items():
        if name not in PARTS:
            raise ValueError(f"losses.{name} is no loss to mix; expected some of {', '.join(PARTS)}")
        if not 0 < coefficient < float("inf"):
            raise ValueError(f"losses.{name}={coefficient} is outside (0, inf); leave it out to do without")
    for name, given in keywords.items():
        if name not in losses:
            raise ValueError(f"keywords.{name} has no loss; losses has {', '.join(losses)}")
        settings = {
            p.name: p for p in inspect.signature(PARTS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY
        }
        for key in given:
            if key not in settings:
                raise ValueError(
                    f"keywords.{name}.{key} is unknown; {name} has {', '.join(settings) or 'none'}"
                )
    for name in losses:
        for p in inspect.signature(PARTS[name]).parameters.values():
            required = p.kind is p.KEYWORD_ONLY and p.default is p.empty
            if required and p.name not in keywords.get(name, {}):
                raise ValueError(f"keywords.{name}.{p.name} is not set; {name} needs it")
