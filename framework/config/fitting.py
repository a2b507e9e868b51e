"""The verdict of a plan: the memory there is, whether a run fits into it, and what would make it fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from framework.config import changes, plan
from framework.config.changes import Change, Remedy
from framework.config.outlines import outlined
from framework.config.plan import Plan, Seen
from framework.config.schema import Run
from framework.config.shortage import remedies
from framework.errors import ConfigError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where containers say how much memory they may have."""


@dataclass(frozen=True)
class Verdict:
    """Bytes of one rank's device, what the run needs of it, and what to change where that is too much."""

    memory: int
    plan: Plan
    changes: Sequence[Change] = ()  # each alone, the cheapest for the result and for time first
    together: Change | None = None  # the fewest of them that fit, where no single one does

    @property
    def fits(self) -> bool:
        return self.plan.peak <= self.memory

    def record(self) -> dict[str, Any]:
        """As JSON."""
        needs = {"peak_bytes": self.plan.peak, "memory_bytes": self.memory, "fits": self.fits}
        return needs | {
            "plan": asdict(self.plan),
            "changes": [_change(change, self) for change in self.changes],
            "together": None if self.together is None else _change(self.together, self),
        }


def judge(run: Run, *, memory: int | None = None, length: int | None = None) -> Verdict:
    """Plan `run`, on a device of `memory` bytes or the one found; if it does not fit, so is every change that
    may help. Raises UserError.
    """
    device = device_of(run, given=memory is not None)
    most = memory if memory is not None else found(device, run.launch.nproc)
    inspected, seen = outlined(run), Seen()
    first = plan.plan(inspected, device, length=length, seen=seen)
    if first.peak <= most:
        return Verdict(most, first)
    helps = [*remedies(run, device), *more_ranks(run)]
    each = list(changes.single(inspected, device, helps, length=length, seen=seen))
    useful = [change for change in each if change.plan.peak < first.peak]
    both = None
    if not any(change.plan.peak <= most for change in useful):
        order = [(" ".join(change.settings), change.why) for change in useful]
        both = changes.together(inspected, device, order, most=most, length=length, seen=seen)
    return Verdict(most, first, useful, both)


def device_of(run: Run, *, given: bool) -> torch.device:
    """Where the run would compute; a GPU where its memory was `given` and nothing was said."""
    if run.launch.device != "auto":
        return torch.device(run.launch.device)
    return torch.device("cuda" if given or torch.cuda.is_available() else "cpu")


def found(device: torch.device, nproc: int) -> int:
    """Bytes of a device here; of a CPU the part of each of `nproc` processes. Raises ConfigError."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "launch.device=cuda: no GPU here whose memory could be asked; type --memory 80GiB"
            )
        return int(torch.cuda.get_device_properties(0).total_memory)
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in map(Path, LIMITS):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            sizes.append(int(text))
    return min(sizes) // nproc


def more_ranks(run: Run) -> list[Remedy]:
    """Twice the processes, where ranks share what they hold."""
    launch = run.launch
    if run.strategy.name == "ddp" or 2 * launch.nproc * launch.nnodes > run.batch.sequences:
        return []
    return [(f"launch.nproc={2 * launch.nproc}", "more devices share weights, gradients and optimizer")]


def _change(change: Change, verdict: Verdict) -> dict[str, Any]:
    return {
        "settings": list(change.settings),
        "why": change.why,
        "peak_bytes": change.plan.peak,
        "saved_bytes": verdict.plan.peak - change.plan.peak,
        "fits": change.plan.peak <= verdict.memory,
    }
