"""Right answers made wrong in every way there is, and in no other."""

import random

from framework.data.damage import damaged


def ways(text, separator=", "):
    found = set()
    for seed in range(200):
        found |= set(damaged(text, separator=separator, draw=random.Random(seed)))
    return found


def test_a_part_is_left_out_said_twice_or_swapped_with_its_neighbour():
    left_out = {"b, c", "a, c", "a, b"}
    twice = {"a, a, b, c", "a, b, b, c", "a, b, c, c"}
    swapped = {"b, a, c", "a, c, b"}
    assert ways("a, b, c") == left_out | twice | swapped
    assert len(damaged("a, b, c", separator=", ", draw=random.Random(0))) == 3


def test_what_would_be_empty_or_the_same_is_no_damage():
    assert ways("a") == {"a, a"}
    assert ways("a, a") == {"a", "a, a, a"}


def test_the_draw_decides():
    once, again = (damaged("a, b, c, d", separator=", ", draw=random.Random(3)) for _ in range(2))
    assert once == again
    orders = {tuple(map(len, damaged("aa, b", separator=", ", draw=random.Random(s)))) for s in range(40)}
    assert len(orders) > 3  # no kind comes first always: a caller may take the first few
