"""A run with some settings changed as they would be typed, and what each change does to the memory it needs.

Settings are GROUP=CHOICE or KEY=VALUE, as in `python launch/train.py ...`, of ours alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import yaml
from pydantic import ValidationError

from framework.config import plan
from framework.config.build import Inspected
from framework.config.compose import CONF
from framework.config.plan import Plan, Seen
from framework.config.schema import Run
from framework.errors import UserError

Remedy = tuple[str, str]  # what to type, what it does


@dataclass(frozen=True)
class Change:
    """Settings to be added to a command and what a rank then needs."""

    settings: tuple[str, ...]
    why: str
    plan: Plan


def changed(run: Run, settings: str) -> Run | None:
    """`run` with `settings`, separated by spaces; None where together they are refused."""
    tree = run.model_dump(mode="json")
    for setting in settings.split():
        key, _, value = setting.partition("=")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        choice = CONF / key / f"{value}.yaml"
        node[leaf] = yaml.safe_load(choice.read_text() if choice.is_file() else value)
    try:
        return Run.model_validate_json(json.dumps(tree))
    except ValidationError:
        return None


def single(
    inspected: Inspected,
    device: torch.device,
    remedies: Sequence[Remedy],
    *,
    length: int | None = None,
    seen: Seen,
) -> Iterator[Change]:
    """Each of `remedies` alone, where it can be planned."""
    for settings, why in remedies:
        if (found := _with(inspected, device, settings, length, seen)) is not None:
            yield Change((settings,), why, found[1])


def together(
    inspected: Inspected,
    device: torch.device,
    remedies: Sequence[Remedy],
    *,
    most: int,
    length: int | None,
    seen: Seen,
) -> Change | None:
    """The shortest beginning of `remedies`, without those that save nothing, with which a rank needs at most
    `most` bytes."""
    chosen: list[str] = []
    least = plan.plan(inspected, device, length=length, seen=seen)
    for settings, why in remedies:
        found = _with(inspected, device, settings, length, seen)
        if found is None or found[1].peak >= least.peak:
            continue
        inspected, least = found
        chosen.append(settings)
        if least.peak <= most:
            return Change(tuple(chosen), why, least)
    return None


def _with(
    inspected: Inspected, device: torch.device, settings: str, length: int | None, seen: Seen
) -> tuple[Inspected, Plan] | None:
    run = changed(inspected.run, settings)
    if run is None:
        return None
    other = replace(inspected, run=run)
    try:
        return other, plan.plan(other, device, length=length, seen=seen)
    except UserError:
        return None
