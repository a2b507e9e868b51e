"""Every engine on every number of ranks computes what one plain process computes."""

import numpy as np
import pytest
import toy
import workers

ENGINES = [
    ("ddp", {}),
    ("fsdp", {}),
    ("fsdp", {"reshard_after_forward": False}),
]


def trains(world, name, options, steps, count, **data):
    engine = toy.start(world, name, precision="fp32", **options, **data)
    history = toy.advance(engine, steps, count=count)
    return history, toy.portable(engine.state_dict())


def worst(joined, reference, which):
    """Largest difference over all parameters, relative to the largest entry."""
    largest = max(np.abs(values[which]).max() for values in reference.values())
    return max(np.abs(joined[name][which] - reference[name][which]).max() for name in reference) / largest


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size, count", [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (4, 2)])
@pytest.mark.parametrize("name, options", ENGINES)
def test_loss_gradient_and_norm_equal_one_plain_process(name, options, size, count, frozen):
    """After one update exp_avg = (1 - beta) * clipped gradient, so the moments show the gradient.

    With 7 rows on 4 ranks in 2 cuts, two micro-batches are empty fills and one holds the row that
    weighs nothing. A mean over ranks or micro-batches would be off by tens of percent.
    """
    history, reference = toy.plain([0], frozen=frozen)
    results = workers.run(size, trains, name, options, [0], count, frozen=frozen)
    updates, joined = toy.whole([state for _, state in results])
    assert updates == 1
    assert joined.keys() == reference.keys()
    assert worst(joined, reference, toy.FIRST) < 1e-6
    for ours, _ in results:
        np.testing.assert_allclose(ours, history, rtol=1e-6)
