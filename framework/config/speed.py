"""What a run's micro-batches cost and what its device could do: from these the trainer tells MFU.

Knows the configuration and the names of devices, no rank and no clock.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from framework.batch import Batch, RolloutBatch
from framework.config import build
from framework.config.build import Inspected
from framework.config.schema import Run
from framework.models.flops import Flops, flops
from framework.models.load import Description
from framework.strategy.common import parameters_on_meta

TERA = 1e12

PEAKS = {
    "NVIDIA B200": 2250,  # DGX B200 data sheet: 4,500 with sparsity
    "NVIDIA H200": 989,  # H200 data sheet: 1,979 with sparsity
    "NVIDIA GH200": 989,  # GH200 data sheet: 990
    "NVIDIA H100": 989,  # H100 data sheet, SXM: 1,979 with sparsity
    "NVIDIA H100 NVL": 835,  # H100 data sheet: 1,671 with sparsity
    "NVIDIA H100 PCIe": 756,  # H100 data sheet: 1,513 with sparsity
    "NVIDIA H20": 148,  # H20 data sheet
    "NVIDIA A100": 312,  # A100 data sheet: 624 with sparsity
    "NVIDIA A40": 149.7,  # A40 data sheet: 299.4 with sparsity
    "NVIDIA A30": 165,  # A30 data sheet: 330 with sparsity
    "NVIDIA L40S": 362,  # L40S data sheet: 733 with sparsity
    "NVIDIA L40": 181,  # L40 data sheet: 362 with sparsity
    "NVIDIA L4": 121,  # L4 data sheet: 242 with sparsity
    "NVIDIA GeForce RTX 4090": 165.2,  # Ada architecture white paper, appendix A, sums in fp32
    "NVIDIA GeForce RTX 3090": 71,  # GA102 architecture white paper, appendix A, sums in fp32
}
"""1e12 FLOP/s of bf16 matrix products without sparsity, by how NVIDIA names the device and where it says so.

The longest name that a device's own begins with counts. A data sheet's clock is rarely reached for long: the
best measured on an H100 is 80 % of this (stas00/ml-engineering)."""


def peak_of(run: Run, device: torch.device) -> float | None:
    """FLOP/s that `device` could do in the run's precision, as typed or as is known; None if neither."""
    if run.launch.peak_tflops is not None:
        return run.launch.peak_tflops * TERA
    if device.type != "cuda" or run.precision != "bf16":
        return None
    return known(torch.cuda.get_device_name(device))


def known(name: str) -> float | None:
    """FLOP/s of a device by its name."""
    longest = max(
        (start for start in PEAKS if f"{name} ".startswith((f"{start} ", f"{start}-"))), key=len, default=None
    )
    return None if longest is None else PEAKS[longest] * TERA


def cost_of(inspected: Inspected) -> Callable[[Batch], float]:
    """FLOPs of a forward and a backward pass of a micro-batch, of real tokens alone.

    A critic takes part where answers were judged. What is only asked (a reference, a teacher) and answers
    being written do not count: they are no training.
    """
    actor = _flops(inspected)
    critic = _flops(inspected, inspected.critic) if inspected.critic is not None else None

    def cost(batch: Batch) -> float:
        lengths = batch.boundaries.diff().tolist()
        both = [actor] if critic is None or not isinstance(batch, RolloutBatch) else [actor, critic]
        return sum(each.of(lengths, len(batch.trained), tokens=batch.tokens) for each in both)

    return cost


def _flops(inspected: Inspected, of: Description | None = None) -> Flops:
    structure = build.build_structure(inspected, torch.device("cpu"), of=of, attention="eager")
    with torch.device("meta"), parameters_on_meta():
        return flops(structure())
