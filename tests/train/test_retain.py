"""What a run has forgotten: paired bounds by hand, alike on any number of ranks, kept over a resume."""

import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import workers

from framework.batch import Outputs
from framework.data import collate
from framework.stages.against import AgainstStart
from framework.train.retain import Cadence, Probe, Retention, Stratum, compare, quantile, relative


def test_the_change_is_a_mean_over_tokens_and_its_bound_is_over_rows():
    """Rows of 1, 2 and 3 tokens that cost 0.1, 0.4 and 0.1 nats more: 0.6 / 6 = 0.1 a token.

    Residuals 0, 0.2, -0.2; variance 3/2 * 0.08 / 36; Student's 0.975 quantile of 2 degrees is 4.30265.
    """
    start = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    now = [(1.1, 1.0), (2.4, 2.0), (3.1, 3.0)]
    found = compare(start, now)
    assert found.change == pytest.approx(0.1, abs=1e-12)
    assert found.half == pytest.approx(4.30265 * math.sqrt(1.5 * 0.08 / 36), rel=1e-5)
    assert found.loss == pytest.approx(6.6 / 6)
    assert (found.rows, found.tokens) == (3, 6)
    assert (found.low, found.high) == pytest.approx((0.1 - found.half, 0.1 + found.half))


def test_the_start_against_itself_has_not_changed_at_all():
    start = [(1.25, 2.0), (3.5, 7.0)]
    found = compare(start, start)
    assert (found.change, found.half) == (0.0, 0.0)


def test_the_interval_covers_the_truth_in_95_of_100_probes():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        tokens = draw.integers(5, 40, 24).astype(float)
        more = tokens * (0.05 + draw.normal(0, 0.1, 24))
        found = compare([(0.0, t) for t in tokens], list(zip(more, tokens, strict=True)))
        covered += found.low <= 0.05 <= found.high
    assert 370 <= covered <= 392


@pytest.mark.parametrize(
    ("freedom", "exact"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (7, 2.36462), (23, 2.06866)],
)
def test_students_quantile(freedom, exact):
    assert quantile(freedom) == pytest.approx(exact, rel=1e-3)


def test_rows_that_say_nothing_are_left_out_and_a_diverged_model_is_seen():
    start = [(math.inf, 2.0), (1.0, 2.0), (1.0, 2.0), (0.0, 0.0)]
    assert compare(start, [(1.0, 2.0), (1.5, 2.0), (1.5, 2.0), (0.0, 0.0)]).rows == 2
    assert math.isnan(compare(start, [(1.0, 2.0), (math.nan, 2.0), (1.5, 2.0), (0.0, 0.0)]).change)
    assert compare(start[:1], [(1.0, 2.0)]) is None
    assert compare([(1.0, 1.0)], [(2.0, 1.0)]).half == math.inf


def test_the_budget_of_one_percent_is_just_under_a_hundredth_of_a_nat():
    assert relative(math.log(1.01)) == pytest.approx(0.01)
    assert relative(1e6) == math.inf


def test_looks_are_at_both_ends_dense_at_first_then_even():
    cadence = Cadence(steps=300, every=100)
    assert [s for s in range(301) if cadence.due(s)] == [0, 10, 20, 30, 100, 200, 300]
    assert cadence.looks() == 7
    assert [s for s in range(6) if Cadence(5, 5).due(s)] == [0, 5]
    assert Cadence(5, 5).looks() == 2


class Words:
    """An engine of a table of log-probabilities, one for each token id, that training changes."""

    def __init__(self, world):
        self.world = world
        self.table = torch.linspace(-5, -0.5, 50, dtype=torch.float32)
        self.passes = 0

    @contextmanager
    def inference(self):
        with torch.no_grad():
            yield

    def __call__(self, batch, *, distribution=None):
        self.passes += 1
        logps = self.table[batch.targets]
        if distribution is None:
            return Outputs(logps)
        every = self.table.log_softmax(0).expand(len(logps), -1)  # the same at each position
        ids = distribution.ids
        if ids is None:
            ids = every.topk(distribution.likeliest).indices
        return Outputs(logps, candidate_ids=ids, candidate_logps=every.gather(1, ids))


def examples():
    draw = np.random.default_rng(3)
    made = [draw.integers(0, 50, n).astype(np.int32) for n in (5, 9, 3, 14, 7, 6, 11)]
    return [(ids, np.arange(len(ids)) > 1) for ids in made]


def watch_of(world, engine, **options):
    rows = examples()

    def micros(size):
        cut = [list(range(at, min(at + size, len(rows)))) for at in range(0, len(rows), size)]
        cut += [[] for _ in range(-len(cut) % world.size)]
        return [
            collate.collate([rows[i] for i in c], c, packing=True, pad_id=0)
            if c
            else collate.fill(packing=True, pad_id=0)
            for c in cut[world.rank :: world.size]
        ]

    strata = [Stratum("a", range(4), "A"), Stratum("b", range(4, 7), "B")]
    objective = AgainstStart(vocabulary=50, likeliest=8)
    return Retention(engine, Probe(strata, micros(2), micros(1)), objective, Cadence(10, 5), **options)


def one():
    return SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), gather=lambda value: [value])


def looked(world, changed):
    """The lines of a run that begins, changes its model and looks again."""
    engine = Words(world)
    watch = watch_of(world, engine)
    watch.begin(None)
    first = watch.look(0)
    engine.table = engine.table + torch.linspace(-0.3, 0.1, 50) * changed
    return [first[-1][1], watch.look(5)[-1][1]]


def test_two_and_three_ranks_find_what_one_finds():
    alone = looked(one(), 1.0)
    assert alone[0]["a/change"] == 0.0
    assert alone[1]["a/change"] > 0.05
    for size in (2, 3):
        for lines in workers.run(size, looked, 1.0):
            for found, expected in zip(lines, alone, strict=True):
                assert found == pytest.approx(expected, abs=1e-6)


def test_the_change_is_that_of_a_loop_over_tokens():
    line = looked(one(), 1.0)[1]
    change = -torch.linspace(-0.3, 0.1, 50).double()
    first = [change[ids[2:]].sum().item() for ids, _ in examples()[:4]]
    tokens = [len(ids) - 2 for ids, _ in examples()[:4]]
    assert line["a/change"] == pytest.approx(sum(first) / sum(tokens), abs=1e-6)
    assert line["a/units"] == sum(tokens)


def test_the_divergence_is_that_of_the_likeliest_tokens_and_the_rest_as_one():
    """By hand from the whole tables; it is 0 at the start, and never above the KL of all tokens."""
    first, line = looked(one(), 1.0)
    assert (first["a/kl"], first["a/kl_high"]) == (0.0, 0.0)
    start = torch.linspace(-5, -0.5, 50).double()
    now = start + torch.linspace(-0.3, 0.1, 50).double()
    p, q = start.softmax(0), now.softmax(0)
    top = p.topk(8).indices
    rest = torch.tensor([i for i in range(50) if i not in top])
    kept = (p[top] * (p[top] / q[top]).log()).sum()
    expected = kept + p[rest].sum() * (p[rest].sum() / q[rest].sum()).log()
    assert line["a/kl"] == pytest.approx(float(expected), rel=1e-4)
    assert line["a/kl"] < float((p * (p / q).log()).sum())
    assert line["b/kl_high"] == pytest.approx(line["b/kl"], rel=1e-4)  # alike at every token


def test_a_resumed_run_keeps_what_the_start_model_said_and_finds_the_same():
    engine = Words(one())
    watch = watch_of(one(), engine)
    watch.begin(None)
    watch.look(0)
    saved = json.loads(json.dumps(watch.state_dict()))
    engine.table = engine.table - 0.25
    expected = watch.look(5)
    resumed_engine = Words(one())
    again = watch_of(one(), resumed_engine)
    again.begin(saved)
    assert resumed_engine.passes == 4  # of the start's likeliest tokens, once for each batch
    assert not again.due(0)
    resumed_engine.table = engine.table
    assert again.look(5) == expected
    assert again.latest["a"].change == pytest.approx(0.25, abs=1e-6)


def test_a_stratum_that_the_checkpoint_lacks_is_asked_for_and_the_others_are_not_changed():
    engine = Words(one())
    watch = watch_of(one(), engine)
    watch.begin(None)
    watch.look(0)
    saved = json.loads(json.dumps(watch.state_dict()))
    saved["start"]["b"]["identity"] = "other rows"
    saved["start"]["a"]["scores"][0][0] += 8.0  # as if the start model had said so
    again = watch_of(one(), Words(one()))
    again.begin(saved)
    again.look(5)
    assert again.latest["b"].change == 0.0
    assert again.latest["a"].change == pytest.approx(-8 / again.latest["a"].tokens)


def test_what_decides_is_told_what_was_found():
    told = []

    class Decide:
        def __call__(self, step, found):
            assert sorted(found.divergences) == ["a", "b"]
            told.append((step, sorted(found.changes), sorted(found.noise)))
            return {"replay/share": 0.5}, [("event", {"message": "moved"})]

        def state_dict(self):
            return {"told": len(told)}

        def load_state_dict(self, state):
            told.append(state)

    engine = Words(one())
    watch = watch_of(one(), engine, decide=Decide(), told=[("event", {"message": "watching"})])
    watch.begin(None)
    assert [kind for kind, _ in watch.look(0)] == ["event", "retain", "event"]
    lines = watch.look(5)
    assert [kind for kind, _ in lines] == ["retain", "event"]
    assert lines[0][1]["replay/share"] == 0.5
    watch_of(one(), engine, decide=Decide()).begin(watch.state_dict())
    assert told == [(0, ["a", "b"], ["a", "b"]), (5, ["a", "b"], ["a", "b"]), {"told": 2}]
