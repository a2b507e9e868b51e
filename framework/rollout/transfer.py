"""What a chain of stages has taught, kept and lost, from one matrix of scores: pure functions of numbers.

Letters: N stages and T tasks. R[i][j] is the score on task j after stage i, larger is better; i = 0 is the
incoming model. Task j is learnt in stage s_j, from 1 to N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

Matrix = Sequence[Sequence[float]]
"""R, [N + 1][T]."""


@dataclass(frozen=True)
class Summary:
    """Means over tasks; those over tasks that are not learnt last are None where there is none."""

    accuracy: float  # ACC: R[N][j]
    learning_accuracy: float  # LA: R[s_j][j]; low where a task is kept because it was never learnt
    backward_transfer: float | None  # BWT: R[N][j] - R[s_j][j] of tasks with s_j < N; below 0 is forgetting
    forgetting: float | None  # of `forgetting` over the same tasks


def forgetting(scores: Matrix, task: int) -> float:
    """F_j = max over i < N of R[i][j], minus R[N][j]: Chaudhry et al. 2018, arXiv 1801.10112, with i = 0 too.

    Below 0 where the last stage has made the task better than it ever was.
    """
    return max(row[task] for row in scores[:-1]) - scores[-1][task]


def summary(scores: Matrix, learnt: Sequence[int]) -> Summary:
    """The means of R with task j learnt in stage `learnt[j]`.

    ACC and BWT as Lopez-Paz and Ranzato 2017, arXiv 1706.08840.
    """
    last = len(scores) - 1
    if not learnt or any(not 1 <= stage <= last for stage in learnt):
        raise ValueError(f"tasks are learnt in stages {list(learnt)}; expected some, each from 1 to {last}")
    tasks = range(len(learnt))
    own = [scores[learnt[j]][j] for j in tasks]
    before = [j for j in tasks if learnt[j] < last]
    return Summary(
        accuracy=fmean(scores[last][j] for j in tasks),
        learning_accuracy=fmean(own),
        backward_transfer=fmean(scores[last][j] - own[j] for j in before) if before else None,
        forgetting=fmean(forgetting(scores, j) for j in before) if before else None,
    )


@dataclass(frozen=True)
class Flips:
    """Shares of items whose answer has changed sides between two models."""

    lost: float  # right, then wrong
    gained: float  # wrong, then right


def flips(before: Sequence[bool], after: Sequence[bool], *, chance: float = 0.0) -> Flips:
    """What was lost and what was gained on the same items, as if nobody had guessed.

    An item is known or it is not, and one that is not is guessed right with the probability `chance` c, anew
    each time. With RW, WR and WW the shares of right then wrong, wrong then right and wrong twice, items that
    stay unknown are WW / (1 - c)^2, of which c (1 - c) each way are luck. So lost = RW / (1 - c) -
    c WW / (1 - c)^2, and gained likewise of WR: at c = 0 the shares themselves, and gained - lost is always
    the rise of (accuracy - c) / (1 - c). Unbiased, so a little below 0 where there was luck alone. For why
    guesses are taken out see Harmon et al. 2025, arXiv 2510.17776.
    """
    if len(before) != len(after) or not before or not 0 <= chance < 1:
        raise ValueError(f"{len(before)} and {len(after)} items, chance {chance}; expected as many, below 1")
    pairs = list(zip(before, after, strict=True))
    lost, gained, wrong = (
        pairs.count(kind) / len(pairs) for kind in ((True, False), (False, True), (False, False))
    )
    luck = chance * wrong / (1 - chance) ** 2
    return Flips(lost / (1 - chance) - luck, gained / (1 - chance) - luck)
