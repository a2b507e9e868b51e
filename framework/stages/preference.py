"""Preference optimisation: pairs of answers, a loss per pair, and what the loss asks for by name.

A loss with a `reference` parameter gets the start model's answer, one with `matched` the coupling of the
whole step; what a loss does not name is not computed. Dropout must be off in the model's configuration:
policy and reference are compared token by token. Letters: K trained positions, N pairs, S = 2N segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from framework.batch import PairBatch
from framework.losses.answers import Answers, answer_sums, wpo_weights
from framework.losses.guard import require
from framework.losses.inputs import inputs
from framework.losses.items import Items
from framework.stages import segments
from framework.stages.base import Term
from framework.stages.coupling import Coupled, policy_logps, same_rank
from framework.stages.moving import Moving
from framework.stages.reference import Reference
from framework.strategy.base import Engine

MATCHED = ("matched", "matched_chosen", "matched_rejected")
EXTRAS = ("entropies", "mean_logps", "collisions")
INPUTS = ("policy", "reference", "weight", "margin", "tokens_per_pair", *MATCHED, *EXTRAS)
"""What a preference loss may ask for by parameter name; `EXTRAS` come as `Answers`, summed like `policy`."""


class Pairs(Protocol):
    """What a loader of pairs hands over for one optimizer step."""

    @property
    def micros(self) -> Sequence[PairBatch]: ...

    @property
    def stats(self) -> Mapping[str, float]: ...


class PairLoader(Protocol):
    """Random access to optimizer steps; its state is {"index": examples consumed}."""

    def next(self) -> Pairs: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class PairObjective:
    """A forward pass over chosen and rejected answers together, then a loss per pair.

    `ld_alpha` is LD-DPO's, for policy and reference alike (`losses.answers.answer_sums`; 1 is plain). `wpo`
    multiplies each pair's loss by how likely its answers are under the policy (`losses.answers.wpo_weights`).

    Metrics besides the loss's own: `logps/chosen` and `logps/rejected` in nats, and `logps/accuracy`, the
    share of pairs whose chosen answer the policy finds likelier, ties half. Raises ValueError for an
    `ld_alpha` outside [0, 1].
    """

    def __init__(self, loss: Callable[..., Items], *, ld_alpha: float = 1.0, wpo: bool = False) -> None:
        require("ld_alpha", ld_alpha, least=0, most=1)
        self.loss = loss
        self.inputs = inputs(loss)
        self.ld_alpha, self.wpo = ld_alpha, wpo
        self.needs = self.inputs & set(EXTRAS) | ({"collisions"} if wpo else set())

    def __call__(self, engine: Engine, batch: PairBatch) -> Items:
        batch = batch.to(engine.world.device)
        outputs = engine(batch, needs=self.needs)
        policy = self.answers(outputs.logps, batch)
        offered: dict[str, Any] = {
            "policy": policy,
            "weight": batch.pair_weights,
            "margin": batch.margins,
            "tokens_per_pair": batch.tokens_per_pair,
        }
        offered |= {name: getattr(batch, name) for name in MATCHED}
        offered |= {name: self.answers(getattr(outputs, name), batch) for name in self.inputs & set(EXTRAS)}
        if "reference" in self.inputs:
            assert batch.reference_logps is not None
            offered["reference"] = self.answers(batch.reference_logps, batch)
        items = self.loss(**{name: offered[name] for name in self.inputs})
        chosen, rejected = policy.chosen.detach(), policy.rejected.detach()
        metrics = {
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "logps/accuracy": wins(chosen - rejected),
        }
        loss = items.loss
        if self.wpo:
            loss = loss * wpo_weights(
                outputs.logps, outputs.collisions, batch.segments, segments.count(batch)
            ).to(loss.dtype)
        return Items(loss, items.weight, {**metrics, **items.metrics})

    def answers(self, logps: Tensor, batch: PairBatch) -> Answers:
        """Token log-probabilities [K] as sums and counts of the answers of each pair."""
        return answer_sums(logps, batch.segments, segments.count(batch), ld_alpha=self.ld_alpha)


class Preference:
    """A `Stage` over a loader of pairs, with held-out sets of fixed micro-batches.

    `reference` is needed by a loss that names one; `moving` refreshes it on its way. Raises ValueError
    when the loss names a reference and none is given.
    """

    def __init__(
        self,
        loader: PairLoader,
        objective: PairObjective,
        held_out: Mapping[str, Sequence[PairBatch]],
        *,
        engine: Engine,
        reference: Reference | None = None,
        moving: Moving | None = None,
    ) -> None:
        if "reference" in objective.inputs and reference is None:
            raise ValueError("the loss takes a reference, and the stage was given none")
        self.loader, self.objective, self.engine = loader, objective, engine
        self.reference, self.moving = reference, moving
        self._asked: dict[str, list[PairBatch]] = {}  # held-out sets with the present reference's answers
        self._held_out = {
            name: Term(objective, Coupled(len(micros), partial(self._again, name, micros)))
            for name, micros in held_out.items()
        }

    def next(self, step: int) -> Sequence[Term]:
        """The one term of this step."""
        if self.moving is not None and self.moving.advance(step):
            self._asked.clear()
        taken = self.loader.next()
        micros = self._couple(self._refer(taken.micros))
        return [Term(self.objective, micros, stats=taken.stats)]

    resting = True

    def reports(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Nothing happens here besides training."""
        return []

    def held_out(self) -> Mapping[str, Term]:
        """The held-out sets, by name."""
        return self._held_out

    def state_dict(self) -> dict[str, Any]:
        """The data position, and where a moving reference is."""
        state = dict(self.loader.state_dict())
        return state if self.moving is None else state | {"reference": self.moving.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from that position. Collective where the reference moves."""
        self.loader.load_state_dict({"index": int(state["index"])})
        if self.moving is not None:
            self.moving.load_state_dict(state["reference"])
            self._asked.clear()

    def _again(self, name: str, micros: Sequence[PairBatch]) -> Sequence[PairBatch]:
        if name not in self._asked:
            self._asked[name] = self._refer(micros)
        return self._couple(self._asked[name])

    def _refer(self, micros: Sequence[PairBatch]) -> list[PairBatch]:
        """With the reference's log-probabilities, where the loss wants them."""
        if "reference" not in self.objective.inputs:
            return list(micros)
        assert self.reference is not None
        answers = self.reference(micros)
        return [replace(batch, reference_logps=logps) for batch, logps in zip(micros, answers, strict=True)]

    def _couple(self, micros: list[PairBatch]) -> list[PairBatch]:
        """With what each pair must know of the others of the step."""
        world = self.engine.world
        if "tokens_per_pair" in self.objective.inputs:
            tokens = sum(float(_chosen_tokens(batch)) for batch in micros)
            tokens, pairs = world.sum([tokens, sum(batch.units for batch in micros)])
            mean = tokens / pairs if pairs else 1.0
            micros = [replace(batch, tokens_per_pair=mean) for batch in micros]
        return self._match(micros) if self.objective.inputs & set(MATCHED) else micros

    def _match(self, micros: list[PairBatch]) -> list[PairBatch]:
        """AOT: what has the same rank among all pairs of the step, pairs that do not count left out."""
        masks = [batch.pair_weights.cpu() > 0 for batch in micros]

        def counted(logps: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
            """(chosen, rejected) of this rank's pairs in nats, on the CPU."""
            answers = [self._answers(*each) for each in zip(logps, micros, strict=True)]
            sides = [(a.chosen[mask], a.rejected[mask]) for a, mask in zip(answers, masks, strict=True)]
            return torch.cat([chosen for chosen, _ in sides]), torch.cat([rejected for _, rejected in sides])

        own_chosen, own_rejected = counted(policy_logps(self.engine, micros))
        chosen, rejected = counted([batch.reference_logps for batch in micros])
        ratios = own_chosen - chosen, own_rejected - rejected
        sides = {
            "matched": (own_chosen - own_rejected, chosen - rejected),
            "matched_chosen": (ratios[1], ratios[0]),
            "matched_rejected": ratios,
        }
        for name in [name for name in MATCHED if name in self.objective.inputs]:
            parts = same_rank(self.engine.world, *sides[name]).split([int(mask.sum()) for mask in masks])
            spread: list[dict[str, Any]] = [
                {name: torch.zeros(len(mask)).masked_scatter(mask, part)}
                for mask, part in zip(masks, parts, strict=True)
            ]
            micros = [replace(batch, **found) for batch, found in zip(micros, spread, strict=True)]
        return micros

    def _answers(self, logps: Tensor | None, batch: PairBatch) -> Answers:
        assert logps is not None
        return self.objective.answers(logps.cpu(), batch.to("cpu"))


def wins(difference: Tensor) -> Tensor:
    """1 where a difference is positive, 1/2 where it is 0, else 0."""
    return 0.5 + 0.5 * difference.sign()


def _chosen_tokens(batch: PairBatch) -> Tensor:
    """Trained tokens of the chosen answers, weighted as their pairs are."""
    return (segments.tokens(batch)[0::2] * batch.pair_weights).sum()
