"""Distillation on given text or own answers: a student towards a teacher at every trained token.

The teacher is asked once a step, before any gradient, for its likeliest tokens; what it said travels with
the micro-batches, so the objective is one pass of the student and a pure loss. Of all tokens what travels
is the teacher's hidden states and one copy of its head: their logits are made a chunk of positions at a time,
beside the student's. Letters: K trained positions, k of n tokens that both models have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from framework.batch import Batch, Distribution, TaughtBatch
from framework.losses.distill import truncated
from framework.losses.guard import require
from framework.losses.inputs import inputs
from framework.losses.items import Items, Objective
from framework.stages.base import Term
from framework.stages.own import Own
from framework.stages.sft import Loader, Supervised, by_source
from framework.strategy.base import Engine, Frozen

INPUTS = ("student_logps", "teacher_logps", "weight")
"""What a divergence may ask for by name: distributions in nats, [K, k] or [K, k + 1], and weights [K]."""


class Teacher:
    """A frozen model that says of every trained position what it would have written there.

    `distribution` asks for its likeliest tokens, or for all of them (`deferred`).
    """

    def __init__(self, frozen: Frozen, distribution: Distribution) -> None:
        self.frozen, self.distribution = frozen, distribution

    def __call__(self, batch: Batch) -> TaughtBatch:
        """The same micro-batch with the teacher's answers. Collective, like `all`."""
        return self.all([batch])[0]

    def all(self, micros: Sequence[Batch]) -> list[TaughtBatch]:
        """Several micro-batches, for which one copy of the head serves."""
        answered: list[TaughtBatch] = []
        asked = self.distribution
        for batch in micros:
            said = self.frozen(batch, distribution=asked)
            asked = replace(asked, teacher=said.head)
            answered.append(
                TaughtBatch(
                    **vars(batch),
                    teacher_ids=said.candidate_ids,
                    teacher_logps=said.candidate_logps,
                    teacher_head=said.head,
                )
            )
        return answered


class Taught(Sequence[TaughtBatch]):
    """Held-out micro-batches of which the teacher is asked one at a time, whenever they are walked.

    Its answers are too large to be kept for all of them. Collective, so all ranks must walk together.
    """

    def __init__(self, micros: Sequence[Batch], teacher: Teacher) -> None:
        self._micros, self._teacher = micros, teacher

    def __len__(self) -> int:
        return len(self._micros)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._micros[index]
        return Taught(chosen, self._teacher) if isinstance(index, slice) else self._teacher(chosen)

    def __iter__(self) -> Iterator[TaughtBatch]:
        return map(self._teacher, self._micros)


class DistillObjective:
    """A forward pass of the student at the teacher's tokens, then a divergence per trained token.

    `loss` is a pure function of two distributions, see `INPUTS`; `distribution` is the one that the teacher
    was asked with. Where the teacher named k < n tokens, `rest` says what becomes of the others
    (`losses.distill.truncated`), alike for both models; of all n the loss is asked a chunk of rows at a
    time. A token costs (1 - a) times its divergence plus a times its plain cross-entropy, a = `sft_share` in
    [0, 1): at a temperature T the gradient of the first is smaller by about T^2, which nothing here makes up
    for.

    The metric `nll` is that cross-entropy in nats, of the student at temperature 1; `sources` as in
    `stages.sft`. Raises ValueError for a share outside its range.
    """

    def __init__(
        self,
        loss: Callable[..., Items],
        distribution: Distribution,
        *,
        rest: Literal["renormalise", "bucket"],
        sft_share: float = 0.0,
        sources: Sequence[str] = (),
    ) -> None:
        require("sft_share", sft_share, least=0, below=1)
        self.loss = loss
        self.inputs = inputs(loss)
        self.distribution = replace(distribution, likeliest=None, deferred=False)
        self.rest: Literal["renormalise", "bucket"] = rest
        self.sft_share = sft_share
        self.sources = sources

    def __call__(self, engine: Engine, batch: TaughtBatch) -> Items:
        batch = batch.to(engine.world.device)
        if batch.teacher_head is None:
            asked = replace(self.distribution, ids=batch.teacher_ids)
            outputs = engine(batch, distribution=asked)
            student, teacher = outputs.candidate_logps, batch.teacher_logps
            assert teacher is not None
            if teacher.shape[1] < asked.vocabulary:
                student, teacher = (truncated(logps, rest=self.rest) for logps in (student, teacher))
            items = self._compare(student, teacher, batch.weights)
        else:
            asked = replace(self.distribution, teacher=batch.teacher_head, divergence=self._compare)
            outputs = engine(batch, distribution=asked)
            items = Items(outputs.divergences, outputs.counted, outputs.metrics)
        loss = items.loss
        if self.sft_share:
            loss = (1.0 - self.sft_share) * loss - self.sft_share * outputs.logps
        metrics = {"nll": -outputs.logps.detach(), **items.metrics}
        return by_source(Items(loss, items.weight, metrics), batch, self.sources)

    def _compare(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Items:
        offered = {"student_logps": student, "teacher_logps": teacher, "weight": weight}
        return self.loss(**{name: offered[name] for name in self.inputs})


class Distillation(Supervised):
    """A `Stage` of supervised data whose micro-batches bring the teacher's answers along.

    With `own`, examples of a step are answered by the student before the teacher is asked.
    """

    def __init__(
        self,
        loader: Loader,
        objective: Objective,
        held_out: Mapping[str, Sequence[Batch]],
        held_out_objective: Objective,
        *,
        teacher: Teacher,
        own: Own | None = None,
    ) -> None:
        sets = {name: Taught(micros, teacher) for name, micros in held_out.items()}
        super().__init__(loader, objective, sets, held_out_objective)
        self.teacher, self.own = teacher, own

    def next(self, step: int) -> Sequence[Term]:
        """The one term of this step. Collective: the student may write some of it, and the teacher answers
        for all of its micro-batches."""
        if self.own is None:
            taken = self.loader.next()
            stats = taken.stats
        else:
            taken = self.loader.next(self.own)
            stats = {**taken.stats, "own_answers": float(self.own.answered)}
        return [Term(self.objective, self.teacher.all(taken.micros), stats=stats)]
