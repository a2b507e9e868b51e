import math
from itertools import pairwise

import pytest

from framework.train.schedule import SHAPES, schedule


def test_linear_without_warmup_by_hand():
    """lr 1, 4 updates, no warm-up: 1, 3/4, 2/4, 1/4 (what transformers' linear schedule gives)."""
    rate = schedule("linear", lr=1.0, total=4, warmup=0)
    assert [rate(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_warmup_reaches_the_base_at_its_last_update():
    """4 updates of warm-up to 2e-5: 5e-6, 1e-5, 1.5e-5, 2e-5."""
    rate = schedule("constant", lr=2e-5, total=10, warmup=4)
    assert [rate(step) for step in range(5)] == pytest.approx([5e-6, 1e-5, 1.5e-5, 2e-5, 2e-5], rel=1e-15)


def test_cosine_by_hand():
    """Halfway between warm-up (2) and total (10) the cosine is 1/2: 0.1 + 0.9 / 2 = 0.55."""
    rate = schedule("cosine", lr=1.0, total=10, warmup=2, min_ratio=0.1)
    assert rate(6) == pytest.approx(0.55, rel=1e-15)
    assert rate(10) == pytest.approx(0.1, rel=1e-15)


def test_wsd_is_flat_and_then_falls_as_one_minus_sqrt():
    """100 updates, the last 16 decay: 4 steps into it 1 - sqrt(4/16) = 1/2."""
    rate = schedule("wsd", lr=1.0, total=100, warmup=10, decay=16)
    assert {rate(step) for step in range(10, 85)} == {1.0}
    assert rate(88) == pytest.approx(0.5, rel=1e-15)
    assert rate(100) == 0.0


@pytest.mark.parametrize("name", SHAPES)
def test_every_schedule_stays_in_range_and_never_grows_after_warmup(name):
    rate = schedule(name, lr=3e-4, total=50, warmup=5, min_ratio=0.1, decay=10)
    values = [rate(step) for step in range(60)]
    assert all(0 < value <= 3e-4 and math.isfinite(value) for value in values)
    assert all(later <= earlier for earlier, later in pairwise(values[4:]))
