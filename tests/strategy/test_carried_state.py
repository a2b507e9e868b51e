"""State by name: bitwise to itself and to any other strategy and number of ranks."""

import numpy as np
import pytest
import torch
import toy
import workers

from framework.strategy.memory import Blocks


def goes_through(world, name):
    """Three updates without a stop; the state after two and after three."""
    engine = toy.start(world, name, precision="fp32")
    history = toy.advance(engine, [0, 1], count=2)
    states = [toy.portable(engine.state_dict())]
    return history + toy.advance(engine, [2], count=2), [*states, toy.portable(engine.state_dict())]


def goes_on(world, name, saved):
    """For each saved state a fresh engine: what it holds after loading, and its third update."""
    answers = []
    for updates, joined in saved:
        engine = toy.start(world, name, precision="fp32")
        engine.load_state_dict(updates, toy.reader(joined))
        loaded = toy.portable(engine.state_dict())
        answers.append((loaded, toy.advance(engine, [2], count=2)[0], toy.portable(engine.state_dict())))
    return answers


def equal(one, other):
    return one[0] == other[0] and all(
        np.array_equal(one[1][name][which], other[1][name][which])
        for name in one[1]
        for which in (toy.MASTER, toy.FIRST, toy.SECOND)
    )


WORLDS = [("ddp", 1), ("ddp", 3), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("fsdp_offload", 1)]


@pytest.fixture(scope="module")
def uninterrupted():
    """By (strategy, size): the history, the state after two updates and after three."""
    runs = {(name, size): workers.run(size, goes_through, name) for name, size in WORLDS}
    return {
        world: (ranks[0][0], *(toy.whole([states[i] for _, states in ranks]) for i in (0, 1)))
        for world, ranks in runs.items()
    }


@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_state_moves_between_strategies_and_worlds_bit_for_bit(name, size, uninterrupted):
    """Saved after two updates, loaded by a fresh engine: the same bits; the third step agrees.

    With the same strategy and world the continuation is the uninterrupted run, bit for bit.
    """
    ranks = workers.run(size, goes_on, name, [after_two for _, after_two, _ in uninterrupted.values()])
    for number, (origin, (history, saved, after_three)) in enumerate(uninterrupted.items()):
        assert saved[0] == 2
        assert equal(toy.whole([answers[number][0] for answers in ranks]), saved)
        for answers in ranks:
            np.testing.assert_allclose(answers[number][1], history[2], rtol=1e-6)
        if origin == (name, size):
            assert ranks[0][number][1] == history[2]
            assert equal(toy.whole([answers[number][2] for answers in ranks]), after_three)


def resumes(world, name, options):
    """In one process: the updates after loading, against those of the engine that was saved."""
    calm = toy.start(world, name, dropout=0.2, **options)
    toy.advance(calm, [0, 1], count=2)
    saved = calm.state_dict()
    kept = toy.portable(saved)
    fresh = toy.start(world, name, dropout=0.2, **options)
    toy.advance(fresh, [5], count=2)  # whatever it did before must not show
    with torch.no_grad():  # nor what a forward pass left gathered
        fresh(toy.micros(0, world.rank, world.size, 1)[0])
    updates, joined = toy.exchanged(world, saved)
    fresh.load_state_dict(updates, toy.reader(joined))
    histories = [toy.advance(engine, [2, 3], count=2) for engine in (calm, fresh)]
    assert toy.same(*(toy.portable(engine.state_dict()) for engine in (calm, fresh)))
    assert toy.same(kept, toy.portable(saved))  # two updates later: a snapshot
    return histories


KINDS = [(kind, bits) for kind in ("none", "full") for bits in ("fp32", "bf16")]
RESUMED = [(name, 2, *kind) for name in ("ddp", "fsdp") for kind in KINDS]
RESUMED += [("hsdp", 4, "full", "bf16"), ("fsdp_offload", 2, "full", "bf16")]


@pytest.mark.parametrize(("name", "size", "checkpointing", "precision"), RESUMED)
def test_resume_is_bitwise_with_dropout_and_state_is_a_snapshot(name, size, checkpointing, precision):
    options = {"precision": precision, "blocks": Blocks(checkpointing)}
    for calm, fresh in workers.run(size, resumes, name, options):
        assert calm == fresh


def forgets(world, name, options):
    """A forward pass between the last backward pass and the update must not keep weights of before."""
    engine = toy.start(world, name, precision="fp32", **options)
    batch = toy.micros(0, world.rank, world.size, 1)[0]
    with engine.micro(last=True):
        engine.backward(toy.total(engine(batch), batch))
    with torch.no_grad():
        before = engine(batch).losses.clone()
    engine.step(lr=0.1, max_grad_norm=None)
    with engine.inference():
        after = engine(batch).losses.clone()
    reference = toy.Toy()
    reference.load_state_dict({n: w.clone() for n, w in engine.weights()}, strict=False)
    with torch.no_grad():
        return bool((before != after).any()), torch.allclose(after, reference(batch).losses, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddp", {}), ("fsdp", {}), ("fsdp", {"reshard_after_forward": False}), ("fsdp_offload", {})],
)
def test_a_forward_pass_before_the_update_leaves_no_old_weights(name, options):
    assert workers.run(2, forgets, name, options) == [(True, True)] * 2
