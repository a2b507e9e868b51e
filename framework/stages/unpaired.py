"""Preference optimisation from single answers that were liked or not: KTO, BCO and losses like them.

What couples the answers of a step is one number, the baseline that each log-ratio is measured from. It is
computed here, over the whole world and without gradients, before the step. Dropout must be off, as for
pairs. Letters: K trained positions, S segments, one answer each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from framework.batch import LabelledBatch
from framework.losses.bco import bco_baseline
from framework.losses.inputs import inputs
from framework.losses.items import Items
from framework.losses.kto import kto_baseline
from framework.stages import segments
from framework.stages.base import Term
from framework.stages.coupling import Coupled, policy_logps
from framework.stages.reference import Reference
from framework.strategy.base import Engine

EXTRAS = ("entropies", "mean_logps", "collisions")
INPUTS = ("policy", "reference", "desirable", "weight", "baseline", *EXTRAS)
"""What a loss of unpaired answers may ask for by parameter name; `EXTRAS` are summed like `policy`."""


class Answers(Protocol):
    """What a loader of labelled answers hands over for one optimizer step, or a held-out set on this rank."""

    @property
    def micros(self) -> Sequence[LabelledBatch]: ...

    @property
    def mismatched(self) -> Sequence[LabelledBatch]:
        """The same prompts with others' answers, for KTO's baseline; empty where nothing asks for it."""


class Taken(Answers, Protocol):
    """One optimizer step."""

    @property
    def stats(self) -> Mapping[str, float]: ...


class Asked(NamedTuple):
    """Answers with the reference's log-probabilities."""

    micros: Sequence[LabelledBatch]
    mismatched: Sequence[LabelledBatch] = ()


class AnswerLoader(Protocol):
    """Random access to optimizer steps; its state is {"index": examples consumed}."""

    def next(self) -> Taken: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class AnswerObjective:
    """A forward pass, then a loss per answer. The metric `baseline` is the number used, where one was."""

    def __init__(self, loss: Callable[..., Items]) -> None:
        self.loss = loss
        self.inputs = inputs(loss)
        self.needs = self.inputs & set(EXTRAS)

    def __call__(self, engine: Engine, batch: LabelledBatch) -> Items:
        batch = batch.to(engine.world.device)
        outputs = engine(batch, needs=self.needs)
        offered: dict[str, Any] = {
            "policy": segments.sums(outputs.logps, batch),
            "desirable": batch.desirable,
            "weight": batch.segment_weights,
        }
        offered |= {name: segments.sums(getattr(outputs, name), batch) for name in self.needs}
        if "reference" in self.inputs:
            assert batch.reference_logps is not None
            offered["reference"] = segments.sums(batch.reference_logps, batch)
        metrics = {}
        if "baseline" in self.inputs:
            assert batch.baseline is not None
            offered["baseline"] = torch.tensor(batch.baseline, device=batch.segment_weights.device)
            metrics["baseline"] = torch.full_like(batch.segment_weights, batch.baseline)
        items = self.loss(**{name: offered[name] for name in self.inputs})
        return Items(items.loss, items.weight, {**metrics, **items.metrics})


class Unpaired:
    """A `Stage` over a loader of labelled answers, with held-out sets of fixed micro-batches.

    A loss that names `baseline` gets one: "mismatched" is KTO's (`losses.kto.kto_baseline`, from the
    step's answers to other prompts), "running" is BCO's (`losses.bco.bco_baseline`, the mean reward of all
    answers so far, this step's included), for which `beta` is what the loss multiplies log-ratios by.
    Held-out sets have a KTO baseline of their own, and BCO's as training left it.

    Raises ValueError when the loss names a reference and none is given.
    """

    def __init__(
        self,
        loader: AnswerLoader,
        objective: AnswerObjective,
        held_out: Mapping[str, Answers],
        *,
        engine: Engine,
        reference: Reference | None = None,
        baseline: Literal["mismatched", "running"] = "mismatched",
        beta: float = 1.0,
    ) -> None:
        if reference is None and objective.inputs & {"reference", "baseline"}:
            raise ValueError("the loss takes a reference, and the stage was given none")
        self.loader, self.objective, self.engine = loader, objective, engine
        self.reference, self.baseline, self.beta = reference, baseline, beta
        self.mean, self.seen = 0.0, 0.0  # of BCO's rewards, and of how many answers
        self._asked: dict[str, Asked] = {}  # held-out sets with the reference's answers
        self._held_out = {
            name: Term(objective, Coupled(len(found.micros), partial(self._again, name, found)))
            for name, found in held_out.items()
        }

    def next(self, step: int) -> Sequence[Term]:
        """The one term of this step."""
        taken = self.loader.next()
        asked = self._refer(taken)
        if "baseline" in self.objective.inputs and self.baseline == "running":
            total, count = self._log_ratios(asked.micros)
            self.mean, self.seen = bco_baseline(self.mean, self.seen, self.beta * total, count)
        return [Term(self.objective, self._couple(asked), stats=taken.stats)]

    resting = True

    def reports(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Nothing happens here besides training."""
        return []

    def held_out(self) -> Mapping[str, Term]:
        """The held-out sets, by name."""
        return self._held_out

    def state_dict(self) -> dict[str, Any]:
        """The data position and BCO's running mean."""
        return {**self.loader.state_dict(), "mean": self.mean, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.loader.load_state_dict({"index": int(state["index"])})
        self.mean, self.seen = float(state["mean"]), float(state["seen"])

    def _again(self, name: str, found: Answers) -> Sequence[LabelledBatch]:
        if name not in self._asked:
            self._asked[name] = self._refer(found)
        return self._couple(self._asked[name])

    def _refer(self, found: Answers) -> Asked:
        """With the reference's log-probabilities, where they are wanted."""
        if self.reference is None:
            return Asked(found.micros)
        groups = [found.micros]
        if "baseline" in self.objective.inputs and self.baseline == "mismatched":
            groups.append(found.mismatched)
        asked = [
            [
                replace(b, reference_logps=logps)
                for b, logps in zip(micros, self.reference(micros), strict=True)
            ]
            for micros in groups
        ]
        return Asked(*asked)

    def _couple(self, found: Asked) -> Sequence[LabelledBatch]:
        """With the baseline of the whole step, where the loss wants one."""
        if "baseline" not in self.objective.inputs:
            return found.micros
        baseline = self.mean
        if self.baseline == "mismatched":
            baseline = kto_baseline(*self._log_ratios(found.mismatched))
        return [replace(batch, baseline=baseline) for batch in found.micros]

    def _log_ratios(self, micros: Sequence[LabelledBatch]) -> tuple[float, float]:
        """(sum of log pi - log ref in nats, answers) over all ranks, answers that do not count left out."""
        total = count = 0.0
        for batch, logps in zip(micros, policy_logps(self.engine, micros), strict=True):
            assert batch.reference_logps is not None
            ratios = _segment_sums(logps, batch) - _segment_sums(batch.reference_logps, batch)
            counts = batch.segment_weights > 0
            total += float(ratios[counts].sum())
            count += float(counts.sum())
        total, count = self.engine.world.sum([total, count])
        return total, count


def _segment_sums(logps: Tensor, batch: LabelledBatch) -> Tensor:
    """[S] fp64 on the CPU."""
    return segments.sums(logps.double().cpu(), batch)
