"""The loop alone, with a one-process engine of a dozen lines: what it counts, adds, skips and repeats."""

import math
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from framework.errors import SapwoodError
from framework.losses.items import Items
from framework.stages.base import Term
from framework.train.trainer import Plan, train


class One:
    """A world of one."""

    rank, size, local_rank, device = 0, 1, 0, torch.device("cpu")

    def sum(self, values):
        return list(values)

    max = sum

    def gather(self, value):
        return [value]


class Line:
    """y = w * dropout(x), trained by plain gradient descent: small enough to check by hand."""

    def __init__(self):
        self.world = One()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.norms = []

    @contextmanager
    def micro(self, *, last):
        yield

    @contextmanager
    def inference(self):
        with torch.no_grad():
            yield

    def __call__(self, batch):
        return self.weight * torch.nn.functional.dropout(batch.x, 0.5, training=batch.dropout)

    def backward(self, loss):
        loss.backward()

    def step(self, *, lr, max_grad_norm):
        norm = abs(float(self.weight.grad))
        self.norms.append(norm)
        if math.isfinite(norm):
            self.weight.data -= lr * self.weight.grad
        self.weight.grad = None
        return norm

    def state_dict(self):
        return self.weight.detach().clone()

    def load_state_dict(self, updates, read):
        self.weight.data.copy_(read("weight", "master", 0, 1)[0])


def micro(*xs, dropout=False):
    x = torch.tensor(xs)
    return SimpleNamespace(x=x, units=float(len(xs)), dropout=dropout)


def objective(engine, batch):
    """Loss w*x per unit: its gradient is the mean of x over all units of the step."""
    return Items(engine(batch), torch.ones_like(batch.x))


class Steps:
    """A stage over a list of steps; its state is the position."""

    def __init__(self, steps, held_out=None):
        self.steps, self.index, self._held_out = steps, 0, held_out or {}

    def next(self, step):
        self.index += 1
        return [Term(objective, self.steps[self.index - 1], stats={"tokens": 3, "trained_tokens": 2})]

    resting = True

    def reports(self):
        return []

    def held_out(self):
        return self._held_out

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]


class Record:
    """Tracker, checkpoints and stop flag in one."""

    def __init__(self, stop_at=None):
        self.lines, self.saved, self.stop_at = [], [], stop_at

    def log(self, kind, metrics, *, step):
        self.lines.append((kind, step, dict(metrics)))

    def artifact(self, path, *, kind):
        pass

    def save(self, step, engine_state, state):
        weight = engine_state.reshape(1)
        self.saved.append(
            SimpleNamespace(step=step, updates=step, state=state, read=lambda name, which, a, b: weight)
        )
        return step

    @property
    def requested(self):
        return self.stop_at is not None and len(self.lines) >= self.stop_at

    def of(self, kind):
        return [(step, metrics) for found, step, metrics in self.lines if found == kind]


def plan(steps, **changes):
    defaults = dict(
        steps=steps,
        seed=0,
        max_grad_norm=None,
        max_skipped=3,
        log_every=1,
        evaluate_every=0,
        evaluate_at_start=False,
        checkpoint_every=0,
        metric=None,
        goal="min",
    )
    return Plan(**(defaults | changes))


def run(stage, record, **changes):
    engine = Line()
    resume, assess = changes.pop("resume", None), changes.pop("assess", None)
    result = train(
        stage,
        engine,
        plan(len(stage.steps), **changes),
        learning_rate=lambda step: 0.1,
        checkpoints=record,
        tracker=record,
        stop=record,
        resume=resume,
        assess=assess,
    )
    return engine, result


def test_the_mean_is_over_all_units_however_the_step_is_cut():
    """x = 1, 2, 6: the mean is 3; the mean of the micro-batch means (1 + 2) / 2 and 6 would be 3.75."""
    cuts = [[[micro(1.0, 2.0, 6.0)]], [[micro(1.0, 2.0), micro(6.0)]], [[micro(1.0), micro(2.0), micro(6.0)]]]
    for cut in cuts:
        record = Record()
        engine, _ = run(Steps(cut), record)
        assert engine.norms == pytest.approx([3.0], rel=1e-6)
        assert record.of("train")[0][1]["loss"] == pytest.approx(2.0 * 3.0, rel=1e-6)


def test_two_terms_keep_their_own_denominators():
    """mean(1, 3) + 0.5 * mean(8) = 2 + 4 = 6."""

    class Two(Steps):
        def next(self, step):
            return [Term(objective, [micro(1.0, 3.0)]), Term(objective, [micro(8.0)], scale=0.5)]

    engine, _ = run(Two([None]), Record())
    assert engine.norms == pytest.approx([6.0], rel=1e-6)


def test_micro_batches_are_let_go_before_the_next_are_asked_for():
    """What a teacher said travels with them, and two steps of it need not fit."""

    class Fresh(Steps):
        def next(self, step):
            assert all(x() is None for x in self.made)
            batch = micro(1.0)
            self.made.append(weakref.ref(batch.x))
            return [Term(objective, [batch])]

    stage = Fresh([None] * 3)
    stage.made = []
    run(stage, Record())
    assert len(stage.made) == 3


def test_a_step_with_nothing_to_train_has_a_gradient_of_zero():
    empty = SimpleNamespace(x=torch.zeros(1), units=0.0, dropout=False)
    engine, _ = run(Steps([[empty]]), Record())
    assert engine.norms == [0.0]


def test_a_gradient_that_is_not_finite_is_counted_and_ends_a_run_when_it_stays():
    bad, good = [micro(math.inf)], [micro(1.0)]
    record = Record()
    engine, result = run(Steps([good, bad, good]), record)
    assert result.progress.skipped == 1
    assert float(engine.weight.detach()) == pytest.approx(2.0 - 0.2)
    assert [line["skipped"] for _, line in record.of("train")] == [0, 1, 1]
    with pytest.raises(SapwoodError, match="not finite for 4 steps in a row"):
        run(Steps([bad] * 9), Record())


def test_stopped_and_resumed_is_bitwise_the_run_that_was_never_stopped():
    steps = [[micro(0.3, 1.7, dropout=True), micro(2.9, dropout=True)] for _ in range(8)]
    held_out = {"task": Term(objective, [micro(1.0, 2.0)])}
    changes = {"evaluate_every": 2, "evaluate_at_start": True, "metric": "task/loss"}
    whole = Record()
    engine, result = run(Steps(steps, held_out), whole, **changes)

    first = Record(stop_at=5)
    _, stopped = run(Steps(steps, held_out), first, **changes)
    assert (stopped.status, result.status) == ("interrupted", "done")
    second = Record()
    again, resumed = run(Steps(steps, held_out), second, **changes, resume=first.saved[-1])

    assert again.weight.detach().item().hex() == engine.weight.detach().item().hex()
    for kind in ("train", "eval"):
        joined = [
            (step, line["loss"] if kind == "train" else line)
            for step, line in first.of(kind) + second.of(kind)
        ]
        assert joined == [(step, line["loss"] if kind == "train" else line) for step, line in whole.of(kind)]
    assert resumed.progress.best == result.progress.best
    assert resumed.progress.tokens == 8 * 3


class Iterations(Steps):
    """Three steps from one rollout: whole only after the third."""

    @property
    def resting(self):
        return self.index % 3 == 0

    def reports(self):
        return [("rollout", {"reward": 1.0})] if self.index % 3 == 1 else []


def test_checkpoints_and_stops_wait_until_the_stage_rests():
    """Due after steps 2, 4 and 6 of 9, saved after 3, 6 and the last; a stop asked for at step 4 waits."""
    steps = [[micro(1.0)] for _ in range(9)]
    record = Record()
    run(Iterations(steps), record, checkpoint_every=2)
    assert [saved.step for saved in record.saved] == [3, 6, 9]
    assert [step for step, _ in record.of("rollout")] == [0, 3, 6]
    record = Record(stop_at=5)  # lines: a rollout and three steps, then another rollout
    _, result = run(Iterations(steps), record)
    assert (result.status, result.progress.step) == ("interrupted", 6)


def test_what_is_assessed_is_an_evaluation_and_the_largest_can_be_best():
    found = iter([0.25, 0.75, 0.5])

    def assess(step):
        return {"task/accuracy": next(found)}, [("samples", {"rows": [step]})]

    record = Record()
    changes = {"evaluate_every": 2, "metric": "task/accuracy", "goal": "max"}
    _, result = run(Steps([[micro(1.0)] for _ in range(6)]), record, assess=assess, **changes)
    assert [(step, line["task/accuracy"]) for step, line in record.of("eval")] == [
        (2, 0.25),
        (4, 0.75),
        (6, 0.5),
    ]
    assert (result.progress.best, result.progress.best_step) == (0.75, 4)
    assert [step for step, _ in record.of("samples")] == [2, 4, 6]
    assert result.metrics == {"task/accuracy": 0.5}


def test_dropout_differs_between_steps_and_micro_batches():
    """Keyed seeds must not repeat one mask: over 40 draws of 8 units all patterns equal is impossible."""
    ones = [1.0] * 8
    record = Record()
    run(Steps([[micro(*ones, dropout=True), micro(*ones, dropout=True)] for _ in range(20)]), record)
    assert len({line["loss"] for _, line in record.of("train")}) > 3


def test_counts_add_up_between_log_lines_and_across_an_evaluation():
    held_out = {"task": Term(objective, [micro(1.0)])}
    record = Record()
    run(Steps([[micro(1.0)]] * 6, held_out), record, log_every=3, evaluate_every=2)
    assert [(step, line["tokens"]) for step, line in record.of("train")] == [(3, 9), (6, 9)]
    assert [step for step, _ in record.of("eval")] == [2, 4, 6]
