"""From rewards to advantages: what a policy gradient multiplies by, computed once per iteration.

Everything that couples answers happens here, over the answers of the whole world, which are few: N answers
in groups (the answers to one prompt), Q answer tokens end to end, `segments` [Q] the answer of each token.
All of it is computed in fp64 and returned in the type of the input. A reward of NaN means that there is
none: it enters no statistic and its answer gets an advantage of 0. Estimators that need more than rewards
say so; the others can be chosen by name from `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from framework.losses.guard import require


def group_normalised(rewards: Tensor, groups: Tensor, *, eps: float = 1e-4) -> Tensor:
    """[N] (R - mean) / (std + eps) within each group: GRPO.

    Shao et al. 2024, arXiv 2402.03300, section 4.1.2. rewards [N]; groups [N] int64 from 0; std with
    Bessel's correction. A group of equal rewards gives exactly 0: seven times 0.3 in fp32 have a mean that
    is off by 3e-8 and a std that is no larger, so that their quotient would be anything. Raises ValueError
    for eps < 0.
    """
    require("eps", eps, least=0)
    values, known = _known(rewards)
    centred = _centred(values, known, groups)
    return _normalised(values, centred, known, groups, eps).to(rewards.dtype)


def group_centred(rewards: Tensor, groups: Tensor) -> Tensor:
    """[N] R - mean of the group: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), no division by the spread,
    which makes questions that are nearly always or nearly never solved weigh most. Shapes as above."""
    values, known = _known(rewards)
    return _centred(values, known, groups).to(rewards.dtype)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """[N] R - mean of the others in the group = n / (n - 1) (R - mean): RLOO, unbiased.

    Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, section 2.2. A group of one gives 0.
    """
    values, known = _known(rewards)
    count = _group_sums(known.double(), groups)[groups]
    return (_centred(values, known, groups) * count / (count - 1).clamp(min=1)).to(rewards.dtype)


def batch_scaled(rewards: Tensor, groups: Tensor, *, eps: float = 1e-4) -> Tensor:
    """[N] (R - mean of the group) / (std of all N rewards + eps): the spread of the batch, which is the same
    for easy and hard questions (arXiv 2508.08221). std with Bessel's correction. ValueError for eps < 0."""
    require("eps", eps, least=0)
    values, known = _known(rewards)
    everything = torch.zeros_like(groups)
    std = _spread(values, _centred(values, known, everything), known, everything)
    scaled = _centred(values, known, groups) / (std + eps)
    return torch.where(std > 0, scaled, 0.0).to(rewards.dtype)


def best_of_group(rewards: Tensor, groups: Tensor, *, eps: float = 1e-4) -> Tensor:
    """[N] (best - second best) / (std + eps) for the best answer of each group, 0 for the others.

    Pass@k as an objective: only the answer without which the group's best reward would be lower is paid.
    Of several that are equally good none is. Std as in `group_normalised`. ValueError for eps < 0.
    """
    require("eps", eps, least=0)
    values, known = _known(rewards)
    std = _spread(values, _centred(values, known, groups), known, groups)[groups]
    shown = torch.where(known, values, -torch.inf)
    best = _group_reduce(shown, groups, "amax")[groups]
    is_best = known & (shown == best)
    second = _group_reduce(torch.where(is_best, -torch.inf, shown), groups, "amax")[groups]
    alone = (_group_sums(is_best.double(), groups)[groups] == 1) & second.isfinite()
    gain = torch.where(is_best & alone, (best - second) / (std + eps), 0.0)
    return gain.to(rewards.dtype)


ESTIMATORS: Mapping[str, Callable[..., Tensor]] = {
    "group_normalised": group_normalised,
    "group_centred": group_centred,
    "leave_one_out": leave_one_out,
    "batch_scaled": batch_scaled,
    "best_of_group": best_of_group,
}
"""Name -> (rewards [N], groups [N]) -> advantages [N]."""


def length_weighted(rewards: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """[N] R - sum_j n_j R_j / sum_j n_j over the group, n = `lengths` [N] in tokens.

    OPO's baseline (Hao et al. 2025, arXiv 2505.23585): of least variance where a longer answer has a
    gradient that is larger in proportion. With equal lengths it is `group_centred`.
    """
    values, known = _known(rewards)
    return _centred(values, known, groups, lengths.double()).to(rewards.dtype)


def gdpo(rewards: Tensor, groups: Tensor, weights: Tensor, *, eps: float = 1e-4) -> Tensor:
    """[N] several rewards, normalised one by one and then together: GDPO (Liu et al. 2026, arXiv 2601.05242).

    rewards [N, R], weights [R]. Each column is normalised within its groups as in `group_normalised`, the
    weighted sum of the columns over the batch: (x - mean) / (std + eps). So a reward of large spread does
    not drown the others. An answer without one of its rewards gets 0. ValueError for eps < 0.
    """
    columns = [group_normalised(column, groups, eps=eps).double() for column in rewards.unbind(1)]
    mixed = torch.stack(columns, 1) @ weights.double()
    mixed = torch.where(rewards.isnan().any(1), torch.nan, mixed)
    return group_normalised(mixed, torch.zeros_like(groups), eps=eps).to(rewards.dtype)


def gae(
    rewards: Tensor,
    values: Tensor,
    segments: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    """(advantages [Q], returns [Q]) by A_t = R_t + g V_t' - V_t + g l A_t' and return = A + V.

    Schulman et al. 2015, arXiv 1506.02438, equation 16. t' is the next counted token of the answer; after the
    last one V and A are 0. Tokens that `mask` [Q] bool leaves out (a tool's output) are passed over as if
    they were not there, and get 0. rewards, values [Q]; segments [Q]
    int64, tokens of an answer in their order. g = `gamma` and l = `lambda_` in [0, 1]; l = 1 is the
    return minus the value. Raises ValueError for a setting outside its range.
    """
    require("gamma", gamma, least=0, most=1)
    require("lambda_", lambda_, least=0, most=1)
    table = _Table(segments, mask)
    reward, value = table.put(rewards), table.put(values)
    after = torch.zeros_like(value)
    after[:, :-1] = value[:, 1:]  # places after the end hold 0
    delta = reward + gamma * after - value
    advantages = table.take(_discounted(delta, gamma * lambda_))
    returns = advantages + table.take(value)
    return advantages.to(values.dtype), returns.to(values.dtype)


def returns_to_go(
    rewards: Tensor, segments: Tensor, mask: Tensor | None = None, *, gamma: float = 1.0
) -> Tensor:
    """[Q] R_t + g R_t' + g^2 R_t'' + ...: REINFORCE++ (Hu et al. 2025, arXiv 2501.03262) before whitening.

    Arguments as in `gae`, of which it is the advantage for l = 1 and values of 0. Raises ValueError for g
    outside [0, 1].
    """
    require("gamma", gamma, least=0, most=1)
    table = _Table(segments, mask)
    return table.take(_discounted(table.put(rewards), gamma)).to(rewards.dtype)


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False, eps: float = 1e-8) -> Tensor:
    """[Q] (x - mean) / sqrt(variance + eps) of the tokens that `mask` [Q] bool counts, 0 elsewhere.

    Both moments are over all counted tokens, so `values` [Q] must be those of the whole world; the variance
    has Bessel's correction, as TRL and verl have it. With `keep_mean` the mean is added again: for rewards,
    whose sign matters. Raises ValueError for eps < 0.
    """
    require("eps", eps, least=0)
    values_wide, mask = values.double(), mask.bool()
    inside = values_wide[mask]
    if not inside.numel():
        return torch.zeros_like(values)
    mean = inside.mean()
    variance = (inside - mean).square().sum() / max(inside.numel() - 1, 1)
    whitened = (values_wide - mean) / (variance + eps).sqrt() + (mean if keep_mean else 0.0)
    return torch.where(mask, whitened, 0.0).to(values.dtype)


def _known(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(rewards [N] fp64 with 0 for NaN, [N] bool)."""
    known = ~rewards.isnan()
    return torch.where(known, rewards, torch.zeros_like(rewards)).double(), known


def _group_sums(values: Tensor, groups: Tensor) -> Tensor:
    count = int(groups.max()) + 1 if groups.numel() else 0
    return torch.zeros(count, dtype=torch.float64, device=values.device).index_add(0, groups, values)


def _group_reduce(values: Tensor, groups: Tensor, reduce: str) -> Tensor:
    count = int(groups.max()) + 1 if groups.numel() else 0
    start = torch.full((count,), -torch.inf if reduce == "amax" else torch.inf, dtype=torch.float64)
    return start.to(values.device).scatter_reduce(0, groups, values, reduce)


def _equal(values: Tensor, known: Tensor, groups: Tensor) -> Tensor:
    """[groups] bool: all rewards the same."""
    highest = _group_reduce(torch.where(known, values, -torch.inf), groups, "amax")
    lowest = _group_reduce(torch.where(known, values, torch.inf), groups, "amin")
    return highest <= lowest


def _centred(values: Tensor, known: Tensor, groups: Tensor, share: Tensor | None = None) -> Tensor:
    """[N] minus the group's mean, weighted by `share` [N]; 0 where unknown and where all are equal."""
    share = known.double() if share is None else share * known
    mean = _group_sums(values * share, groups) / _group_sums(share, groups).clamp(min=1)
    teaches = known & ~_equal(values, known, groups)[groups]
    return torch.where(teaches, values - mean[groups], 0.0)


def _spread(values: Tensor, centred: Tensor, known: Tensor, groups: Tensor) -> Tensor:
    """[groups] standard deviation with Bessel's correction, exactly 0 where all are equal."""
    count = _group_sums(known.double(), groups)
    variance = _group_sums(centred.square(), groups) / (count - 1).clamp(min=1)
    return variance.sqrt()


def _normalised(values: Tensor, centred: Tensor, known: Tensor, groups: Tensor, eps: float) -> Tensor:
    std = _spread(values, centred, known, groups)[groups]
    return torch.where(std > 0, centred / (std + eps), 0.0)


class _Table:
    """Flat tokens of answers as rows of equal length, counted tokens only, filled up with 0 at the end."""

    def __init__(self, segments: Tensor, mask: Tensor | None) -> None:
        counts = torch.ones_like(segments, dtype=torch.bool) if mask is None else mask.bool()
        order = segments.argsort(stable=True)
        order = order[counts[order]]
        row = segments[order]
        rows = int(segments.max()) + 1 if segments.numel() else 0
        lengths = torch.bincount(row, minlength=rows)
        starts = lengths.cumsum(0) - lengths
        column = torch.arange(len(order), device=segments.device) - starts[row]
        self._where = (row, column)
        self._order = order
        self._total = len(segments)
        self._shape = (rows, int(lengths.max()) if rows else 0)

    def put(self, flat: Tensor) -> Tensor:
        """[rows, longest] fp64."""
        table = torch.zeros(self._shape, dtype=torch.float64, device=flat.device)
        table[self._where] = flat[self._order].double()
        return table

    def take(self, table: Tensor) -> Tensor:
        """[Q] fp64, 0 where the mask left out."""
        flat = torch.zeros(self._total, dtype=torch.float64, device=table.device)
        flat[self._order] = table[self._where]
        return flat


def _discounted(table: Tensor, discount: float) -> Tensor:
    """x_t + d x_{t+1} + d^2 x_{t+2} + ... along each row, from the end."""
    result = torch.zeros_like(table)
    carried = torch.zeros_like(table[:, 0]) if table.shape[1] else table.new_zeros(table.shape[0])
    for t in range(table.shape[1] - 1, -1, -1):
        carried = table[:, t] + discount * carried
        result[:, t] = carried
    return result
