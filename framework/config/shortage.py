"""A run that needs more memory than there is: which of its settings would help, the largest saving first.

Knows the configuration and the two ways in which torch says so. How much a setting saves is planned where the
model is known (`config.plan`); where it is not, settings come in an order that is usual.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence

import torch

from framework.config.build import Inspected
from framework.config.schema import Run
from framework.config.stage import ONLINE
from framework.errors import SapwoodError
from framework.strategy.base import World

GIB = 2**30
SHOWN = 3  # settings: enough to choose from
SMALLEST_CHUNK = 64  # trained positions in the head; below that its products are too small to be fast


class OutOfMemory(SapwoodError):
    """A tensor did not fit. The message says what to type."""


@contextlib.contextmanager
def explained(run: Run, world: World, inspected: Inspected | None = None) -> Iterator[None]:
    """Raises OutOfMemory in place of what torch and Python raise when memory runs out.

    With the run's models `inspected` the message says what each setting would save.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_shortage(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the tensors that they hold
        said = (str(error) or "Python could not allocate memory").splitlines()[0]
        helps = advice(run, world.device, inspected)
        raise OutOfMemory(message(said, helps, rank=world.rank, device=world.device)) from None


def is_shortage(error: BaseException) -> bool:
    """Whether memory ran out: on an accelerator, in torch's allocator of the CPU, or in Python's own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def message(said: str, helps: Sequence[tuple[str, str]], *, rank: int, device: torch.device) -> str:
    """What happened and what to type."""
    width = max((len(setting) for setting, _ in helps), default=0)
    lines = [f"  {setting:{width}}  {why}" for setting, why in helps]
    head = f"rank {rank} ran out of memory on {device}: {said}"
    if not lines:
        return f"{head}\nnothing is left to save by a setting: take a smaller model or more memory"
    return "\n".join([f"{head}\nwhat would help most, to be added to the same command:", *lines])


def advice(run: Run, device: torch.device, inspected: Inspected | None) -> list[tuple[str, str]]:
    """The three of `remedies` that save most, with their bytes.

    The first three where nothing can be planned.
    """
    found = remedies(run, device)
    if inspected is None:
        return found[:SHOWN]
    try:
        from framework.config import changes, plan  # after the fact alone: a run does not wait for it

        seen: plan.Seen = {}
        now = plan.plan(inspected, device, seen=seen).peak
        tried = [(now - c.plan.peak, c) for c in changes.single(inspected, device, found, seen=seen)]
    except Exception:  # whatever goes wrong here must not hide that memory ran out
        return found[:SHOWN]
    best = sorted((entry for entry in tried if entry[0] > 0), key=lambda entry: -entry[0])[:SHOWN]
    return [(change.settings[0], f"saves {saved / GIB:.1f} GiB: {change.why}") for saved, change in best]


def remedies(run: Run, device: torch.device) -> list[tuple[str, str]]:
    """(what to type, what it does) for what this run leaves unsaved, the largest saving first.

    Activations come first: they are most of what a micro-batch takes, and saving them changes no result.
    Then what is kept for each parameter, then the head, and last what makes it another run.
    """
    model, batch = run.model, run.batch
    found: list[tuple[str, str]] = []
    if batch.tokens_per_micro > run.data.max_length:
        half = max(run.data.max_length, batch.tokens_per_micro // 2)
        found.append((f"batch.tokens_per_micro={half}", "fewer tokens at once; the result stays the same"))
    if model.activation_checkpointing != "full":
        found.append(("model.activation_checkpointing=full", "keeps block inputs alone, a third slower"))
    several = run.launch.nproc * run.launch.nnodes > 1
    if several and run.strategy.name in ("ddp", "zero1", "zero2"):
        found.append(("strategy=fsdp", "spreads weights, gradients and optimizer over the ranks"))
    elif getattr(run.strategy, "reshard_after_forward", True) is False:
        found.append(("strategy.reshard_after_forward=true", "drops gathered weights between passes"))
    elif device.type != "cpu" and run.strategy.name in ("ddp", "fsdp"):
        found.append(("strategy=fsdp_offload", "weights and optimizer wait in the host's memory"))
    elif device.type != "cpu" and run.strategy.name == "zero3":
        found.append(("strategy=zero3_offload", "the optimizer waits in the host's memory"))
    if device.type != "cpu" and not model.activation_offload:
        found.append(("model.activation_offload=true", "what blocks keep waits in the host's memory"))
    if run.stage.name in ONLINE and getattr(run.rollout, "batch_size", 1) > 1:
        size = max(1, run.rollout.batch_size // 2)  # type: ignore[union-attr]
        found.append((f"rollout.batch_size={size}", "fewer answers written at once"))
    if model.head_chunk_tokens > SMALLEST_CHUNK:
        chunk = max(SMALLEST_CHUNK, model.head_chunk_tokens // 4)
        found.append((f"model.head_chunk_tokens={chunk}", "fewer logits at once"))
    if run.precision == "fp32":
        found.append(("precision=bf16", "half the activations; another run, in another run_dir"))
    if run.adapter.kind == "full":
        found.append(("adapter=lora", "no optimizer for frozen weights; another run, in another run_dir"))
    if run.data.max_length > 1 and batch.tokens_per_micro <= run.data.max_length:
        half = run.data.max_length // 2
        found.append(
            (
                f"data.max_length={half} batch.tokens_per_micro={half}",
                "shorter examples; another run, in another run_dir",
            )
        )
    return found
