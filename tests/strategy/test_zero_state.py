"""State of ZeRO engines by parameter name: exact over world sizes, and to and from other strategies."""

import pytest
import torch
import workers
from zero_worlds import cut, equal, reader, start, tiny, train, weights_of, whole

from framework.strategy.base import FIRST, MASTER, SECOND
from framework.strategy.ddp import Ddp
from framework.strategy.fsdp2 import Fsdp
from framework.strategy.zero import Zero

STRATEGIES = {
    "zero1": lambda world, precision: Zero(world, 1, precision),
    "zero2": lambda world, precision: Zero(world, 2, precision),
    "zero3": lambda world, precision: Zero(world, 3, precision),
    "ddp": Ddp,
    "fsdp": Fsdp,
}


def make(world, strategy, precision, seed, options):
    return start(STRATEGIES[strategy](world, precision), seed, **options)


def three_then_two(world, strategy, precision, options):
    """(state after three steps, weights then, losses and norms of two more, weights at the end)"""
    engine = make(world, strategy, precision, 0, options)
    train(engine, [cut(world.size, 2, step) for step in range(3)], lr=0.1, clip=1.0)
    state, weights = engine.state_dict(), weights_of(engine)
    return state, weights, *two_more(engine)


def two_more(engine):
    return train(engine, [cut(engine.world.size, 2, step) for step in (3, 4)], lr=0.1, clip=1.0), weights_of(
        engine
    )


def resumed(world, strategy, precision, options, states):
    """The same from another rank's states, by an engine that began elsewhere and went on."""
    engine = make(world, strategy, precision, 7, options)
    train(engine, [cut(world.size, 2, step) for step in (8, 9)], lr=0.5, clip=None)
    with torch.no_grad():
        engine(cut(world.size, 1)[world.rank][0])
    engine.load_state_dict(states[0].updates, reader(states))
    state, weights = engine.state_dict(), weights_of(engine)
    return state, weights, *two_more(engine)


def saved(size, strategy, precision="fp32", options=None):
    ranks = workers.run(size, three_then_two, strategy, precision, options or {})
    return [rank[0] for rank in ranks], ranks[0]


@pytest.mark.parametrize(
    ("size", "strategy", "precision", "options"),
    [
        (2, "zero1", "bf16", {}),
        (2, "zero2", "fp32", {}),
        (2, "zero2", "bf16", {"adapter": True}),
        (2, "zero3", "fp32", {}),
        (3, "zero3", "bf16", {}),
        (3, "zero3", "bf16", {"adapter": True}),
    ],
)
def test_reloading_in_the_same_world_continues_to_the_bit(size, strategy, precision, options):
    states, (_, weights, numbers, end) = saved(size, strategy, precision, options)
    assert states[0].updates == 3
    for rank, (state, *found) in enumerate(workers.run(size, resumed, strategy, precision, options, states)):
        assert state.updates == 3
        for name, shards in states[rank].shards.items():
            for saved_shard, shard in zip(shards, state.shards[name], strict=True):
                assert (saved_shard.shape, saved_shard.start) == (shard.shape, shard.start)
                assert equal(saved_shard.values, shard.values)
        trained = set(states[0].shards)
        for ours, theirs in zip(found[0].items(), weights.items(), strict=True):
            assert ours[0] == theirs[0]
            # frozen weights are of the model that was built, not of the state
            assert ours[0] not in trained or torch.equal(ours[1], theirs[1])
        if trained == set(weights):
            assert found[1] == numbers
            assert equal(found[2], end)


@pytest.mark.parametrize(
    ("before", "after", "precision"),
    [
        ((2, "zero3"), (3, "zero3"), "bf16"),
        ((3, "zero3"), (2, "zero2"), "fp32"),
        ((2, "zero1"), (2, "zero3"), "bf16"),
        ((2, "zero3"), (1, "zero3"), "fp32"),
        ((1, "zero3"), (3, "zero3"), "fp32"),
        ((2, "zero3"), (3, "fsdp"), "fp32"),
        ((3, "fsdp"), (2, "zero3"), "bf16"),
        ((3, "fsdp"), (3, "zero3"), "fp32"),
        ((3, "zero3"), (2, "ddp"), "bf16"),
        ((2, "ddp"), (3, "zero3"), "fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[1]}-{value[0]}",
)
def test_state_moves_to_other_worlds_and_strategies_to_the_bit(before, after, precision):
    states, (_, weights, (norms, losses), _) = saved(*before, precision)
    ranks = workers.run(after[0], resumed, after[1], precision, {}, states)
    moved = [rank[0] for rank in ranks]
    assert {state.updates for state in moved} == {3}
    for which in (MASTER, FIRST, SECOND):
        assert equal(whole(states, which), whole(moved, which))
    for _, found, (found_norms, found_losses), _ in ranks:
        assert equal(found, weights)
        # bf16: other orders of summing round otherwise
        assert found_losses[0] == pytest.approx(losses[0], rel=1e-6 if precision == "fp32" else 1e-3)
        assert found_norms == pytest.approx(norms, rel=1e-4 if precision == "fp32" else 2e-2)


def fresh(world, strategy):
    return make(world, strategy, "fp32", 0, {}).state_dict()


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_a_fresh_engine_has_a_state_with_moments_of_zero(strategy):
    states = workers.run(3, fresh, strategy)
    assert [state.updates for state in states] == [0] * 3
    assert not any(moment.any() for which in (FIRST, SECOND) for moment in whole(states, which).values())
    assert equal(whole(states, MASTER), {name: p.detach() for name, p in tiny().named_parameters()})
