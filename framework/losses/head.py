"""The language-model head a chunk of positions at a time: products into logits, and slopes back again.

What `logprobs` and `candidates` share; knows no model and no machine. Letters: K positions, d hidden width,
V vocabulary. At most [chunk, V] exists at any moment, in either pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """How raw products become logits, `chunk` positions at a time.

    With z = scale * (hidden weight^T + bias) the logits are c tanh(z / c) where a `softcap` c is given, else
    z, divided by `temperature`: the order of the models that have all three (Gemma, Cohere, Granite).
    Raises ValueError for a chunk or a temperature that is not positive.
    """

    chunk: int
    scale: float
    softcap: float | None
    temperature: float

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.temperature <= 0:
            raise ValueError(f"chunk={self.chunk} and temperature={self.temperature} must be positive")


def statistics_of(hidden: Tensor) -> torch.dtype:
    """What logs and sums are computed in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunks(rows: int, chunk: int) -> Iterator[slice]:
    """0..rows in pieces of `chunk`."""
    for start in range(0, rows, chunk):
        yield slice(start, min(start + chunk, rows))


def consumed_logsumexp(logits: Tensor) -> Tensor:
    """[rows], in place of `logits` [rows, V], which nobody needs any more."""
    highest = logits.amax(1)
    return logits.sub_(highest[:, None]).exp_().sum(1).log_().add_(highest)


class Buffers:
    """Room for one chunk, used again for the next: fresh memory of this size costs as much as the
    arithmetic on it, since the system hands it out page by page."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk: int) -> None:
        rows, vocabulary = min(chunk, hidden.shape[0]), weight.shape[0]
        statistics = statistics_of(hidden)
        self._products = hidden.new_empty(rows, vocabulary)
        same = hidden.dtype == statistics
        self._logits = self._products if same else hidden.new_empty(rows, vocabulary, dtype=statistics)
        self._partial: Tensor | None = None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rules: Rules) -> Tensor:
        """[rows, V] logits after scale, softcap and temperature, to be changed in place at will."""
        rows = hidden.shape[0]
        product = torch.mm(hidden, weight.t(), out=self._products[:rows])
        logits = self._logits[:rows]
        if logits.dtype != product.dtype:
            logits.copy_(product)
        if bias is not None:
            logits.add_(bias.to(logits.dtype))
        if rules.scale != 1.0:
            logits.mul_(rules.scale)
        if rules.softcap is not None:
            logits.div_(rules.softcap).tanh_().mul_(rules.softcap)
        return logits if rules.temperature == 1.0 else logits.div_(rules.temperature)

    def rounded(self, values: Tensor) -> Tensor:
        """`values` [rows, V] in the type of the model, in place of the products."""
        products = self._products[: values.shape[0]]
        return values if values.dtype == products.dtype else products.copy_(values)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total += left @ right, kept in `total`'s type even where the factors are of half precision."""
        if total.dtype == left.dtype:
            total.addmm_(left, right)
        elif total.is_cuda:
            total += torch.mm(left, right, out_dtype=total.dtype)
        else:
            if self._partial is None:
                self._partial = right.new_empty(total.shape)
            total += torch.mm(left, right, out=self._partial)


class Gradients:
    """Of hidden [K, d], weight [V, d] and bias [V], as far as they are wanted, chunk by chunk.

    Those of weight and bias are summed in fp32 (fp64 for fp64 inputs). None where not wanted.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rules: Rules,
        wanted: Sequence[bool],  # of hidden, weight, bias
    ) -> None:
        statistics = statistics_of(hidden)
        self._hidden, self._bias, self._rules = hidden, bias, rules
        self._matrix = weight.to(hidden.dtype)
        self._buffers = Buffers(hidden, self._matrix, rules.chunk)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=statistics) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=statistics) if bias is not None and wanted[2] else None

    def logits(self, part: slice) -> tuple[Tensor, Tensor | None]:
        """[rows, V] the chunk's logits, to be changed in place, and the slope of their softcap if any."""
        rules = self._rules
        logits = self._buffers.logits(self._hidden[part], self._matrix, self._bias, rules)
        if rules.softcap is None:
            return logits, None  # the value of the tanh is logits * temperature / softcap
        return logits, 1 - (logits * (rules.temperature / rules.softcap)).square_()

    def add(self, part: slice, slopes: Tensor, softcap_slopes: Tensor | None) -> None:
        """Count the slopes [rows, V] of the chunk's logits, which are changed in place."""
        rules = self._rules
        if softcap_slopes is not None:
            slopes.mul_(softcap_slopes)
        if rules.scale != rules.temperature:
            slopes.mul_(rules.scale / rules.temperature)
        if self.bias is not None:
            self.bias += slopes.sum(0)
        slopes = self._buffers.rounded(slopes)
        if self.hidden is not None:
            torch.mm(slopes, self._matrix, out=self.hidden[part])
        if self.weight is not None:
            self._buffers.add_product(self.weight, slopes.t(), self._hidden[part])
