"""What all reinforcement learning shares: a source of optimizer steps that needs the current weights.

An iteration is a transaction: prompts, answers, rewards, the trainer's own log-probabilities, advantages,
minibatches. Nothing is kept until it is whole, and everything in it is keyed by (seed, iteration, ...), so a
run that was killed inside one repeats it. What is computed per answer token is shared with all ranks before
it is used: statistics and the contents of minibatches cannot depend on their number. Where one step takes all
answers and nothing before it needs the log-probabilities, that step's own forward passes give them, and the
rollout is reported after it.
The algorithm comes in as a `Method`. Letters: N answers, Q answer tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from framework.batch import Outputs, RolloutBatch
from framework.errors import ConfigError, SapwoodError
from framework.keyed import key
from framework.rollout.base import CRITIC, Rollout, Sampling
from framework.rollout.experience import (
    Averaging,
    Experience,
    Packing,
    Running,
    Shaping,
    minibatches,
    rollout_batches,
)
from framework.stages import measures, sharing
from framework.stages.asking import Clock, Prompts, Reward, ask, check_failures
from framework.stages.base import Term
from framework.stages.policy_objective import PolicyObjective
from framework.strategy.base import Engine

Correction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(old_logps, sampler_logps, owners) -> weights, [Q] each; a bound `losses.correction.sampler_correction`."""

UNSHAPED = Shaping()


@dataclass
class _Unread:
    """An iteration that waits for its one step: what is known of it, and what that step trains on."""

    metrics: Mapping[str, Any]
    chosen: Sequence[int] = ()
    micros: Sequence[RolloutBatch] = ()


class Method(Protocol):
    """What an algorithm makes of an iteration's answers, and how it learns from them."""

    needs: frozenset[str]  # fields of `Outputs` that `estimate` reads
    wants_reference: bool

    def objective(self, iteration: int) -> PolicyObjective:
        """What minibatches of this iteration are trained with; the same object as long as it is the same."""

    def estimate(self, experience: Experience) -> tuple[Experience, Mapping[str, float]]:
        """The same experience with advantages (and returns) known, 0 where nothing counts; metrics.

        Called once an iteration, with everything in `experience` alike on all ranks.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size of an iteration and what is made of it."""

    prompts: int  # prompts in an iteration
    sequences: int  # answers in an optimizer step, over all ranks
    epochs: int = 1  # times that every answer is trained on
    averaging: Averaging = "token"
    extra_prompts: int = 0  # drawn at most in place of those whose answers all scored alike; 0: keep these
    mask_truncated: bool = False  # answers that did not end by themselves are judged but not trained on
    max_failed_share: float = 0.5  # of an iteration's rewards; when more fail, the run stops
    stop_kl: float | None = None  # nats per token from the iteration's first policy that end its epochs
    shown: int = 4  # answers in a "samples" report


class Online:
    """A `Stage` that rolls out when its queue of minibatches is empty.

    `engine` is the model in training and `rollout` its sampling copy; `reference` answers like an engine
    for the start model, and is asked only when `method` wants it. `sampling.temperature` is applied to
    every log-probability that the trainer computes. `shaping` makes scores of rewards, `correction` weights
    of the difference between sampler and trainer. `decode` turns token ids into text for reports.
    """

    def __init__(
        self,
        engine: Engine,
        method: Method,
        plan: Plan,
        *,
        prompts: Prompts,
        rollout: Rollout,
        reward: Reward,
        sampling: Sampling,
        packing: Packing,
        seed: int,
        shaping: Shaping = UNSHAPED,
        correction: Correction | None = None,
        reference: Callable[..., Outputs] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        if sampling.temperature <= 0:
            raise ConfigError(
                f"rollout.temperature={sampling.temperature} always draws the same answer, and teaches "
                "nothing; type a temperature above 0, such as 1.0"
            )
        if method.wants_reference and reference is None:
            raise ConfigError("this stage compares with the start model, but has no reference model")
        self.engine, self.method, self.plan = engine, method, plan
        self.prompts, self.rollout, self.reward = prompts, rollout, reward
        self.sampling, self.packing, self.seed = sampling, packing, seed
        self.reference = reference if method.wants_reference else None
        self.shaping, self.seen = shaping, Running()
        self.correction = correction
        self.decode = decode
        self.index = 0  # prompts consumed
        self.iteration = 0  # iterations rolled out
        self._experience: Experience | None = None
        self._queue: deque[list[int]] = deque()
        self._reports: list[tuple[str, Mapping[str, Any]]] = []
        self._unread: _Unread | None = None
        self._unchecked = False  # whether a step was taken whose distance was not looked at yet

    # ----- the stage

    def next(self, step: int) -> Sequence[Term]:
        """The next minibatch as a term; rolls out first when there is none left. Collective."""
        if self.resting:
            self._iterate(step)
        assert self._experience is not None
        chosen = self._queue.popleft()
        micros = rollout_batches(
            self._experience,
            chosen,
            self.packing,
            averaging=self.plan.averaging,
            longest=self.sampling.max_new_tokens,
        )
        self._unchecked = True
        objective = self.method.objective(self.iteration - 1)
        if self._unread is not None:
            self._unread.chosen, self._unread.micros = chosen, micros
        return [Term(objective, micros, stats=self._stats(chosen, len(micros)))]

    @property
    def resting(self) -> bool:
        """Whether no minibatch is left. Collective where `stop_kl` is set: it may end the epochs here."""
        if self._queue and self._unchecked and self.plan.stop_kl is not None:
            self._unchecked = False
            kl = self.method.objective(self.iteration - 1).distance(self.engine.world)
            if kl > self.plan.stop_kl:
                self._reports.append(
                    ("event", {"message": _stopped(kl, self.plan.stop_kl, len(self._queue))})
                )
                self._queue.clear()
        return not self._queue

    def reports(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """What happened in rollouts since the last call. Collective."""
        self._read()
        waiting, self._reports = self._reports, []
        return waiting

    def held_out(self) -> Mapping[str, Term]:
        """None: what is held out here is answered and judged (`rollout.assess`)."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Counters and the method's numbers; whole only while `resting`."""
        return {
            "index": self.index,
            "iteration": self.iteration,
            "scores": asdict(self.seen),
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the next iteration."""
        self.index, self.iteration = int(state["index"]), int(state["iteration"])
        self.seen = Running(**state["scores"])
        self.method.load_state_dict(state["method"])
        self._experience = self._unread = None
        self._queue.clear()
        self._unchecked = False

    # ----- an iteration

    def _iterate(self, step: int) -> None:
        """Roll out and fill the queue."""
        clock = Clock()
        self.rollout.update(self.engine.weights(without=CRITIC), version=step)
        clock.lap("update")
        asked = ask(
            self.prompts,
            self.rollout,
            self.reward,
            self.sampling,
            start=self.index,
            wanted=self.plan.prompts,
            extra=self.plan.extra_prompts,
            clock=clock,
        )
        experience, metrics = asked.experience, dict(asked.metrics)
        check_failures(experience, self.plan.max_failed_share)
        if self.plan.mask_truncated:
            experience = replace(experience, counted=experience.counted & experience.finished)
        once = self._once(experience)
        experience = self._known(experience, ours=not once)
        clock.lap("forward")
        scores = self.shaping(experience.rewards, experience.finished, self.seen, experience.groups)
        experience = self._corrected(replace(experience, scores=scores))
        experience, estimated = self.method.estimate(experience)
        slowest = self.engine.world.max(list(clock.seconds.values()))
        metrics |= estimated
        metrics |= {f"seconds/{name}": s for name, s in zip(clock.seconds, slowest, strict=True)}
        metrics |= {"iteration": self.iteration, "data_index": asked.stop}
        for epoch in range(self.plan.epochs):
            order = torch.Generator().manual_seed(key(self.seed, "minibatches", self.iteration, epoch))
            self._queue.extend(minibatches(experience, sequences=self.plan.sequences, order=order))
        self._experience = experience
        self._unread = _Unread(metrics) if once else None
        if not once:
            self._tell(experience, metrics)
        self.index = asked.stop
        self.iteration += 1
        self._unchecked = False
        self.method.objective(self.iteration - 1).forget()

    def _once(self, experience: Experience) -> bool:
        """Whether the forward pass of training is the first that has to read these answers."""
        steps = self.plan.epochs * -(-len(experience.completions) // self.plan.sequences)
        return steps == 1 and not self.method.needs and self.correction is None

    def _read(self) -> None:
        """Report an iteration of one step when that step's forward passes are done. Collective."""
        unread, experience = self._unread, self._experience
        heard = self.method.objective(self.iteration - 1).heard
        if unread is None or not unread.micros or not all(id(batch) in heard for batch in unread.micros):
            return
        assert experience is not None
        answers = iter([heard.pop(id(batch)) for batch in unread.micros])
        answered = sharing.over_tokens(
            self.engine.world, experience, self.packing, lambda _: next(answers), unread.chosen
        )
        self._unread = None
        told = replace(experience, old_logps=answered["logps"], entropies=answered["entropies"])
        self._tell(told, unread.metrics)

    def _tell(self, experience: Experience, metrics: Mapping[str, Any]) -> None:
        """Put the iteration's lines among the reports."""
        line = {**metrics, **measures.of_rollout(experience), **measures.of_advantages(experience)}
        self._reports.append(("rollout", line))
        if self.plan.shown:
            self._reports.append(
                ("samples", {"rows": measures.rows(experience, self.plan.shown, self.decode)})
            )

    def _known(self, experience: Experience, *, ours: bool) -> Experience:
        """With what the reference and, where `ours` is wanted, the trainer say of the answers."""
        needs = self.method.needs | {"logps", "entropies"}
        temperature = {"temperature": self.sampling.temperature}

        def asked(batch: Any) -> dict[str, Tensor]:
            outputs = self.engine(batch, needs=needs - {"logps"}, **temperature)
            return {name: getattr(outputs, name) for name in sorted(needs)}

        with self.engine.inference():
            if ours:
                answered = sharing.over_tokens(self.engine.world, experience, self.packing, asked)
                experience = replace(
                    experience,
                    old_logps=answered["logps"],
                    entropies=answered["entropies"],
                    old_values=answered.get("values"),
                )
            if (start_model := self.reference) is not None:
                theirs = sharing.over_tokens(
                    self.engine.world,
                    experience,
                    self.packing,
                    lambda batch: {"logps": start_model(batch, **temperature).logps},
                )
                experience = replace(experience, reference_logps=theirs["logps"])
        return experience

    def _corrected(self, experience: Experience) -> Experience:
        """With a weight for every token that sampler and trainer see differently."""
        if self.correction is None:
            return experience
        assert experience.old_logps is not None
        if experience.sampler_logps is None:
            raise SapwoodError(
                "stage.correction needs the sampler's log-probabilities, but this rollout engine gives none; "
                "type stage.correction.level=none"
            )
        return replace(
            experience,
            correction=self.correction(experience.old_logps, experience.sampler_logps, experience.owners),
        )

    def _stats(self, chosen: Sequence[int], micros: int) -> dict[str, float]:
        """Facts of a step, alike on all ranks."""
        experience = self._experience
        assert experience is not None
        trained = (experience.lengths * experience.counted).tolist()
        return {
            "tokens": float(sum(experience.total(s) for s in chosen)),
            "trained_tokens": float(sum(trained[s] for s in chosen)),
            "sequences": float(len(chosen)),
            "micros": float(micros),
            "data_index": float(self.index),
        }


def _stopped(kl: float, limit: float, left: int) -> str:
    return (
        f"epochs ended early: KL to the iteration's first policy {kl:.4f} > {limit}, {left} minibatches left"
    )
