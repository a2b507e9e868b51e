"""A coefficient by its share of the gradient: a ratio of two norms, alike everywhere, and nothing moved."""

import pytest
import recipes
import workers

SHARE = 0.25


def balanced(world, arguments):
    """(coefficients of two steps, norms by AdamW's first moment, whether the engine was left as it was)."""
    from dataclasses import replace

    import torch

    from framework.config import build, compose, stages
    from framework.strategy.base import FIRST
    from framework.train.balance import Balance
    from framework.train.meter import Meter
    from framework.train.trainer import accumulate

    run = compose.compose(arguments)
    prepared = build.prepare(run)
    engine = build.build_engine(prepared, world)
    stage = stages.build_stage(prepared, world, engine)
    (own,), (general,), (later,) = (stage.next(step) for step in range(3))

    def step(terms, rate):
        accumulate(engine, terms, seed=0, step=0, meter=Meter(world))
        return engine.step(lr=rate, max_grad_norm=None)

    def norm(term):
        """By a second engine, which may be spoilt."""
        other = build.build_engine(prepared, world)
        accumulate(other, [term], seed=0, step=0, meter=Meter(world))
        other.step(lr=0.0, max_grad_norm=None)
        shards = [s.values[FIRST] for each in other.state_dict().shards.values() for s in each]
        (squares,) = world.sum(
            [float(sum((v.double() / (1 - recipes.BETA1)).square().sum() for v in shards))]
        )
        return squares**0.5

    def state():
        found = engine.state_dict()
        return found.updates, {
            (name, i, which): value
            for name, shards in found.shards.items()
            for i, shard in enumerate(shards)
            for which, value in shard.values.items()
        }

    norms = norm(own), norm(general)
    step([own], 1e-3)
    untouched = state()
    fresh = build.build_engine(prepared, world)
    balance = Balance(fresh, every=2)
    asked = [own, replace(general, share=SHARE)]
    first = balance(asked, seed=0, step=0)
    kept = balance([own, replace(later, share=SHARE)], seed=0, step=1)  # not due
    again = Balance(engine, every=2)
    again.load_state_dict(balance.state_dict())
    second = again(asked, seed=0, step=2)
    after = state()
    same = untouched[0] == after[0] and all(torch.equal(untouched[1][k], after[1][k]) for k in untouched[1])
    scales = [terms[1].scale for terms in (first, kept, second)]
    assert [terms[0].scale for terms in (first, kept, second)] == [1.0] * 3
    return scales, norms, again.state_dict(), same


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipes.write_rows(tmp_path_factory.mktemp("balance") / "rows.jsonl")


@pytest.fixture(scope="module")
def one(data, tiny_model_dir):
    ((answer),) = workers.run(
        1, balanced, recipes.overrides(tiny_model_dir, data, data.parent), timeout_s=120
    )
    return answer


def test_the_coefficient_is_the_share_times_the_ratio_of_the_norms(one):
    (first, kept, second), (own, general), state, same = one
    assert first == pytest.approx(SHARE * own / general, rel=1e-5)
    assert kept == first
    assert second == pytest.approx(SHARE * state["norms"][0] / state["norms"][1])
    assert second != first
    assert state["measured"] == 2
    assert same


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero3", 2)])
def test_every_strategy_finds_the_same_and_moves_nothing(strategy, size, one, data, tiny_model_dir):
    asked = recipes.overrides(tiny_model_dir, data, data.parent, strategy=strategy)
    ranks = workers.run(size, balanced, asked, timeout_s=180)
    assert all(rank[0] == ranks[0][0] and rank[3] for rank in ranks)
    assert ranks[0][0] == pytest.approx(one[0], rel=1e-4)
