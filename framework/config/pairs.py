"""The table of what cannot be done together: strategy, adapter, stage, precision, device and number of ranks.

`TABLE` is its only home. What no row names works, and the certificate (`config.certify`) runs it. A row says
what was found and what to type for the nearest pair that can. Imports no torch: all but the device is known
before anything heavy starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from framework.config.nodes import refuse
from framework.config.stage import writes
from framework.config.strategy import Hsdp, ZeroPlusPlus
from framework.errors import ConfigError

if TYPE_CHECKING:
    from framework.config.schema import Run

LAYERWISE = ("zero3", "zero3_offload", "zeropp")
"""Strategies of DeepSpeed that hook every layer."""


@dataclass(frozen=True)
class Row:
    """A combination that is refused. `applies` tells by the run and its device, None while that is open."""

    keys: str
    found: str
    expected: str
    type_this: str
    applies: Callable[[Run, str | None], bool]


def _lossy(run: Run) -> bool:
    """Whether weights or gradients are rounded to be sent."""
    chosen = run.strategy
    return isinstance(chosen, ZeroPlusPlus) and (chosen.quantized_weights or chosen.quantized_gradients)


def _own_copy(run: Run) -> bool:
    """Whether the reference is a second copy of the model that is trained."""
    frozen = getattr(run.stage, "reference", None) == "frozen"
    return frozen and getattr(run.stage, "reference_path", None) is None


def _in_hardware(run: Run) -> bool:
    """Whether 8-bit floats are multiplied by the device itself."""
    return run.model.fp8 is not None and not run.model.fp8_emulate


_EXACT = "strategy.quantized_weights=false strategy.quantized_gradients=false"

TABLE = (
    Row(
        "adapter, stage.name",
        "answers to be written while training, by a copy into which DoRA's lengths are not merged",
        "another adapter",
        "adapter=lora",
        lambda run, device: run.adapter.kind == "dora" and writes(run.stage),
    ),
    Row(
        "adapter, evaluate.prompts",
        "answers to be written while training, by a copy into which DoRA's lengths are not merged",
        "another adapter",
        "adapter=lora",
        lambda run, device: run.adapter.kind == "dora" and bool(run.evaluate.prompts),
    ),
    Row(
        "adapter, retain.prompts",
        "answers to be written while training, by a copy into which DoRA's lengths are not merged",
        "another adapter",
        "adapter=lora",
        lambda run, device: run.adapter.kind == "dora" and bool(run.retain.prompts),
    ),
    Row(
        "adapter, stage.reference",
        "a copy of the model in full as the start of what is held in 4 bits",
        "the policy without its adapter",
        "stage.reference=auto",
        lambda run, device: run.adapter.kind == "qlora" and _own_copy(run),
    ),
    Row(
        "adapter, model.compile",
        "compiled blocks of weights in 4 bits, which torch's compiler does not take",
        "no compiler, or weights in full",
        "model.compile=none or adapter=lora",
        lambda run, device: run.adapter.kind == "qlora" and run.model.compile != "none",
    ),
    Row(
        "model.compile, strategy",
        "compiled blocks under a strategy of DeepSpeed, whose hooks on every layer leave nothing to compile",
        "another strategy, or no compiler",
        "strategy=fsdp or model.compile=none",
        lambda run, device: run.model.compile != "none" and run.strategy.name in LAYERWISE,
    ),
    Row(
        "adapter, model.fp8",
        "products in 8-bit floats under adapters, of frozen weights that could be kept in fewer bits",
        "weights that are trained, or no 8-bit floats",
        "adapter=full or model.fp8=null",
        lambda run, device: run.model.fp8 is not None and run.adapter.kind != "full",
    ),
    Row(
        "model.fp8, strategy",
        "products in 8-bit floats under a strategy of DeepSpeed that hooks every layer",
        "a strategy that gathers whole blocks, or no 8-bit floats",
        "strategy=fsdp or model.fp8=null",
        lambda run, device: run.model.fp8 is not None and run.strategy.name in LAYERWISE,
    ),
    Row(
        "model.fp8, precision",
        "products in 8-bit floats, meant to save time, in a run of precision=fp32",
        "bf16, or roundings that are emulated",
        "precision=bf16 or model.fp8_emulate=true",
        lambda run, device: _in_hardware(run) and run.precision == "fp32",
    ),
    Row(
        "model.fp8, launch.device",
        "products in 8-bit floats on a CPU",
        "a GPU that has them, or roundings that are emulated",
        "model.fp8_emulate=true or model.fp8=null",
        lambda run, device: _in_hardware(run) and device == "cpu",
    ),
    Row(
        "strategy.quantized_weights, strategy.quantized_gradients, precision",
        "numbers of 8 and 4 bits sent in a run of precision=fp32",
        "rounding nowhere, or bf16",
        f"precision=bf16 or {_EXACT}",
        lambda run, device: _lossy(run) and run.precision == "fp32",
    ),
    Row(
        "strategy.quantized_weights, strategy.quantized_gradients, launch.device",
        "DeepSpeed's kernels that quantise, which are for CUDA, on a CPU",
        "a GPU, or nothing quantised",
        _EXACT,
        lambda run, device: _lossy(run) and device == "cpu",
    ),
)
"""In the order in which they are looked for."""


def check(run: Run) -> None:
    """Raises a refusal unless `run` can be carried out, as far as that is known before its device is."""
    chosen, device = run.strategy, run.launch.device
    for refusal in _refusals(run, None if device == "auto" else device):
        raise refusal
    if isinstance(chosen, Hsdp | ZeroPlusPlus):
        _groups(chosen, run)


def check_device(run: Run, device: str) -> None:
    """Raises ConfigError unless `run` can be carried out on `device`, "cpu" or "cuda"."""
    for refusal in _refusals(run, device):
        raise ConfigError(refusal.message())


def _refusals(run: Run, device: str | None) -> Iterator[PydanticCustomError]:
    for row in TABLE:
        if row.applies(run, device):
            yield refuse(row.keys, row.found, row.expected, row.type_this)


def _groups(chosen: Hsdp | ZeroPlusPlus, run: Run) -> None:
    """Refuse groups that the ranks do not divide into; names the nearest that they do."""
    key, size, world = "strategy.shard_size", chosen.shard_size, run.launch.nproc * run.launch.nnodes
    if size is None:
        return
    hsdp = isinstance(chosen, Hsdp)
    if size == 1:
        raise refuse(
            key,
            "a whole copy of the model on every rank"
            if hsdp
            else "a whole copy of the weights on every rank",
            "two or more ranks to share a copy",
            "strategy=ddp" if hsdp else "strategy=zero2",
        )
    if world % size == 0:
        return
    divisors = [divisor for divisor in range(2, world + 1) if world % divisor == 0]
    near = [d for d in divisors if d < size][-1:] + [d for d in divisors if d > size][:1]
    otherwise = "strategy=fsdp" if hsdp else "strategy=zero3"
    raise refuse(
        f"{key}, launch.nproc",
        f"{world} {'rank' if world == 1 else 'ranks'} in groups of {size}",
        f"a size that divides {world}" if near else "two or more ranks",
        " or ".join([f"{key}={divisor}" for divisor in near] or [otherwise]),
    )
