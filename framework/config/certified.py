"""A certificate on paper: a JSON file with every cell, and a Markdown page with the largest differences.

Knows what was found and no way of finding it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from framework.config.certify import BOUND, MOST, NAMES, TIMES, Found

COMPARED = ("agrees", "disagrees")

HEAD = """# Certificate: one run, however it is spread

Made by `{command}`; not edited by hand.

A cell is one run of ten steps: a stage, a strategy, an adapter, rows packed or padded, a step cut into
micro-batches or taken whole, a number of ranks. It goes through the same configuration as any run and is
compared with one fp32 process that spreads, packs and cuts nothing: for supervised training plain
transformers and torch, an example at a time; for other stages our own run. The model is a random Llama of
60,000 parameters, the data are uneven and partly masked, gradients are clipped at norm 1. Answers of PPO and
GRPO are written in the run, and in fp32 they must be the same token by token.

- **loss**: the largest difference of any of the ten steps, over the largest loss of the run.
- **gradient**: of the first step, before clipping, which would hide a wrong scale: norm of the difference
  over norm of the gradient.
- **weights**: what is trained, after ten updates of AdamW: norm of the difference over norm of the weights.

In fp32 each is at most {bound:.0e}. Two right programs add in different orders, and fp32 rounds each sum to
6e-8 of its terms. AdamW then divides a gradient by its own size: where an entry's gradient is nothing but
that rounding, its step is of full size in a random direction. At AdamW's usual eps of 1e-8 right programs
drift apart for this reason alone; the certificate takes 1e-6, which leaves the step of every gradient well
above it as it is.

In bf16, too, a cell is compared with fp32, so with rounding itself. How far that alone takes a run says one
process in bf16 that spreads nothing, the furthest of packed, padded, whole and cut, and a cell may be at most
{times:g} times as far; a first gradient at most {most[gradient]:.0e} in any case, and under full fine-tuning
losses at most {most[loss]:.0e} and weights {most[weights]:.0e}. What is trained of an adapter is nothing but
what was learnt, so its weights are further apart than those of a whole model, of which most was there before.
"""


def write(found: Sequence[Found], where: Path, page: Path | None, *, command: Sequence[str]) -> None:
    """All cells as JSON to `where` and a summary as Markdown to `page`."""
    where.parent.mkdir(parents=True, exist_ok=True)
    tree = {"machine": machine(), "command": list(command), "cells": [one.row() for one in found]}
    where.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(markdown(found, command=command), encoding="utf-8")


def markdown(found: Sequence[Found], *, command: Sequence[str]) -> str:
    """The page."""
    said = Counter(one.verdict for one in found)
    minutes = sum(one.seconds for one in found) / 60
    lines = [
        HEAD.format(command=shlex.join(["python", *command]), bound=BOUND, times=TIMES, most=MOST),
        "## Result",
        "",
        f"{len(found)} cells in {minutes:.0f} minutes: "
        + ", ".join(f"{count} {verdict}" for verdict, count in said.most_common())
        + f". {machine()}.",
        "",
        "| stage | strategy | adapter | cells | loss | gradient | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str, str], list[Found]] = {}
    for one in found:
        if one.verdict in COMPARED:
            cell = one.cell
            groups.setdefault((cell.stage, cell.strategy, cell.adapter, cell.precision), []).append(one)
    for (stage, strategy, adapter, precision), here in groups.items():
        largest = [max(one.differences[name] for one in here) for name in NAMES]
        marked = "" if precision == "fp32" else f" ({precision})"
        numbers = " | ".join(f"{value:.0e}" for value in largest)
        if precision != "fp32":
            numbers = " | ".join(
                f"{value:.1e} of {here[0].bounds[name]:.1e}"
                for name, value in zip(NAMES, largest, strict=True)
            )
        lines.append(f"| {stage} | {strategy} | {adapter}{marked} | {len(here)} | {numbers} |")
    for title, verdicts in (
        ("Refused", ("refused",)),
        ("Not compared", ("not compared",)),
        ("Not in order", ("disagrees", "failed")),
    ):
        if rest := [one for one in found if one.verdict in verdicts]:
            lines += ["", f"## {title}", "", *_reasons(rest)]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Where this was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    libraries = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "deepspeed"))
    return f"{os.cpu_count()} cores, {device}, Python {platform.python_version()}, {libraries}"


def _reasons(found: Sequence[Found]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for one in found:
        by_reason.setdefault(one.why.strip().splitlines()[-1], []).append(str(one.cell))
    return [f"- {len(names)} cells, such as `{names[0]}`: {why}" for why, names in by_reason.items()]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
