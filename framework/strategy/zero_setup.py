"""The deepspeed package, configured, imported and let go of: what `strategy.zero` must know of its habits.

DeepSpeed's configuration is derived from ours and never read from a user.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.errors import ConfigError
from framework.strategy import common
from framework.strategy.base import World


def deepspeed_config(
    *, stage: int, precision: str, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ds_config of a run, whole.

    `stage` is 1 (moments and masters are sharded), 2 (and gradients) or 3 (and weights); `precision`
    is "fp32" or "bf16"; `options` are more keys of `zero_optimization`. Limits that are not named here are
    DeepSpeed's: under stage 3 up to 1e9 gathered parameters are kept for the backward pass, so a small
    model is gathered once per micro-batch.
    """
    config: dict[str, Any] = {
        # Sizes DeepSpeed insists on; batches are cut elsewhere and nothing of ours reads these.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Every `step` ends a window, however many backward passes came before it.
        "managed_gradient_accumulation": False,
        # The optimizer is torch's AdamW, made by the caller, stepping on flat fp32 masters.
        "zero_allow_untested_optimizer": True,
        # Progress is printed by trackers.
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": stage,
            # Reduce in order on one stream: the same sums in the same order on every run.
            "overlap_comm": False,
            # Elements per reduction, and of a buffer that is allocated once: 200 MB of fp32 where
            # the default of 5e8 takes 2 GB of every device.
            "reduce_bucket_size": 50_000_000,
            # Small parameters are sharded like all others, so state has one layout.
            "stage3_param_persistence_threshold": 0,
            # True replaces torch.nn.functional.linear for the whole process, for good; `micro` does
            # so for the length of one micro-batch.
            "memory_efficient_linear": False,
            **(options or {}),
        },
        # An offloaded update is made by torch's fused AdamW, too: vectorised, and nothing to compile.
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16":
        # bf16 weights and activations over fp32 masters ...
        config["bf16"] = {"enabled": True}
        # ... whose gradients are accumulated over micro-batches ...
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        # ... and summed over ranks in fp32; both default to bf16.
        config["communication_data_type"] = "fp32"
    if config["zero_optimization"].get("zero_quantized_gradients"):
        # The kernel takes whatever bits it is given for fp16.
        config["communication_data_type"] = "fp16"
    return config


def package(world: World) -> Any:
    """The deepspeed package, imported for this device and quiet."""
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read once, when deepspeed is imported
    try:
        import deepspeed
        import deepspeed.runtime.zero.parameter_offload
    except ImportError as error:
        raise ConfigError(
            f"strategy=zero3 needs DeepSpeed, which does not import here ({error}); "
            "type `pip install 'sapwood[deepspeed]'`, or strategy=fsdp"
        ) from error
    if not hasattr(deepspeed.DeepSpeedEngine, "managed_gradient_accumulation"):
        raise ConfigError(
            f"deepspeed {deepspeed.__version__} is installed, and it cannot leave the length of a step "
            "to the caller; type `pip install 'deepspeed>=0.19.8'`, or strategy=fsdp"
        )
    # Its shared-memory all-reduce is compiled on first use (a minute) and not used in training.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # skipped steps are counted by the trainer
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message=".*(all_gather_into|reduce_scatter)_tensor"
    )
    return deepspeed


def sharding(deepspeed: Any, config: dict[str, Any]) -> Any:
    """A `zero.Init` for one model. Collective.

    The ranks that share a second copy (hpZ) are one global of DeepSpeed, which it makes once and refuses to
    make again for the next model.
    """
    from deepspeed.utils import groups

    size = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    known = groups._get_zero_param_intra_parallel_group()
    if known is not None and dist.get_world_size(known) != size:
        known = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if known is None and size > 1:
        groups._create_zero_param_parallel_group(size)
        known = groups._get_zero_param_intra_parallel_group()
    return deepspeed.zero.Init(config_dict_or_path=config, zero_param_parallel_group=known)


def initialize(deepspeed: Any, module: nn.Module, **arguments: Any) -> Any:
    """DeepSpeed's engine around `module`, made in silence."""
    with silent():
        engine, *_ = deepspeed.initialize(model=module, dist_init_required=False, **arguments)
    # DeepSpeed keeps every module whose weights it has sharded in this list for good, and reads of it only
    # what it pushes during a forward pass.
    stack = deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
    stack[:] = [kept for kept in stack if kept is not module]
    return engine


def measure_as_we_do(optimizer: Any, world: World) -> None:
    """Make a ZeRO optimizer take the norm of gradients by `common.sum_of_squares`.

    That of ZeRO-1 in bf16 is torch's in fp32, on a CPU 0.6 % too small at 2^24 elements; that of the
    others copies every gradient to fp64.
    """

    offloaded = getattr(optimizer, "offload_optimizer", False)
    where = torch.device("cpu") if offloaded else world.device

    def squares(gradients: Sequence[Tensor]) -> Tensor:
        return common.sum_of_squares([gradient.float() for gradient in gradients], where)

    if hasattr(optimizer, "get_grads_for_norm"):  # ZeRO-1 in bf16: whole gradients on every rank
        given = optimizer.get_grads_for_norm

        def one_number(for_clipping: bool = False) -> Any:
            if for_clipping:
                return given(for_clipping=True)
            gradients, experts = given()
            return [squares(gradients).sqrt().float().view(1)], experts  # its norm is itself

        optimizer.get_grads_for_norm = one_number
        return

    def norm(gradients: Sequence[Tensor], parameters: Any, norm_type: float = 2) -> Tensor:
        total = squares(gradients)
        dist.all_reduce(total)
        return total.sqrt()

    optimizer.get_grad_norm_direct = norm
    if offloaded:

        def norms() -> list[Tensor]:
            """Over the sums of all micro-batches, on the host; its own is of the device, and in fp32."""
            if world.device.type == "cuda":
                torch.cuda.synchronize(
                    world.device
                )  # gradients are on their way, to there and to the masters
            return [norm([optimizer.grad_partitions_flat_buffer], None)]

        optimizer._get_norm_groups = norms


@contextlib.contextmanager
def fetched(optimizer: Any, group: int) -> Iterator[None]:
    """Inside, the masters and moments of one of a ZeRO optimizer's groups are in memory; changes are kept."""
    if not getattr(optimizer, "swap_optimizer", False) or not optimizer._swappable_optimizer_subgroup(group):
        yield
        return
    flat, swapper = optimizer.fp32_partitioned_groups_flat[group], optimizer.optimizer_swapper
    swapper.swap_in_optimizer_state(parameter=flat)
    try:
        yield
    finally:
        swapper.swap_out_optimizer_state(parameter=flat)


def destroy(engine: Any) -> None:
    """Let go of a model: DeepSpeed's hooks hold it, and a cache that all its engines share."""
    engine.destroy()
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in cached.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """DeepSpeed prints its progress; nobody has asked."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
