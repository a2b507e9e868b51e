"""Summing gradients over gloo with half the traffic.

gloo's reduce-scatter sends what an all-reduce sends: 2 (w - 1) / w of the gradient from each of w ranks,
where (w - 1) / w would do. Here every rank gives each other rank the piece that is its to sum, and sums the
pieces it gets, in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class SumByExchange:
    """In place of FSDP2's reduce-scatter (`FSDPModule.set_custom_reduce_scatter`), on the CPU.

    It holds what a rank receives beside what it gives: the size of the largest block's gradient, in fp32.
    """

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,  # [n]
        input_tensor: Tensor,  # [w * n], a piece for each rank
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM, op
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)
