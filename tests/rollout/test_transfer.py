"""A chain's numbers, worked by hand."""

import random

import pytest

from framework.rollout.transfer import Summary, flips, forgetting, summary

SCORES = [
    [0.1, 0.5, 0.0],  # the incoming model
    [0.9, 0.4, 0.0],
    [0.6, 0.8, 0.1],
    [0.5, 0.7, 1.0],
]


def test_three_tasks():
    """ACC (.5 + .7 + 1) / 3; LA (.9 + .8 + 1) / 3; BWT (-.4 - .1) / 2; F (.4 + .1) / 2, F_3 = .1 - 1."""
    found = summary(SCORES, [1, 2, 3])
    assert found.accuracy == pytest.approx(2.2 / 3)
    assert found.learning_accuracy == pytest.approx(0.9)
    assert found.backward_transfer == pytest.approx(-0.25)
    assert found.forgetting == pytest.approx(0.25)
    assert [forgetting(SCORES, j) for j in range(3)] == pytest.approx([0.4, 0.1, -0.9])


def test_what_the_incoming_model_could_do_can_be_forgotten():
    """The second task was at .5 before anything was trained, and its own stage brought it to .2 only."""
    scores = [[0.0, 0.5], [1.0, 0.3], [1.0, 0.2], [1.0, 0.25]]
    assert forgetting(scores, 1) == pytest.approx(0.25)
    assert summary(scores, [1, 2]).backward_transfer == pytest.approx((0.0 + 0.05) / 2)


def test_stages_may_outnumber_tasks_and_one_task_has_nothing_behind_it():
    """One task learnt in the first of three stages, then in the last of one."""
    assert summary([[0.0], [0.75], [0.5], [0.25]], [1]) == Summary(0.25, 0.75, -0.5, 0.5)
    assert summary([[0.0], [0.75]], [1]) == Summary(0.75, 0.75, None, None)
    with pytest.raises(ValueError, match="each from 1 to 1"):
        summary([[0.0], [0.75]], [2])


def test_flips_by_hand():
    """Of 10 items 4 stay right, 3 are lost, 1 is gained and 2 stay wrong.

    At c = 1/4: 2/10 / (9/16) = 16/45 unknown twice, 1/4 of 3/4 of them lucky each way: 3/10 / (3/4) - 1/4 *
    16/45 = 14/45 lost, 1/10 / (3/4) - 4/45 = 2/45 gained; the difference is (5/10 - 7/10) / (3/4).
    """
    before = [True] * 7 + [False] * 3
    after = [True] * 4 + [False] * 3 + [True] + [False] * 2
    plain, fair = flips(before, after), flips(before, after, chance=0.25)
    assert (plain.lost, plain.gained) == pytest.approx((0.3, 0.1))
    assert fair.lost == pytest.approx(14 / 45)
    assert fair.gained == pytest.approx(2 / 45)
    assert fair.gained - fair.lost == pytest.approx((0.5 - 0.7) / 0.75)


def test_guesses_alone_are_no_forgetting():
    """100,000 items of four choices, 30 % known before, of which a third is forgotten, 10 % newly known."""
    draw = random.Random(0)
    before, after = [], []
    for _ in range(100_000):
        fate = draw.random()
        known = (fate < 0.3, fate < 0.2 or fate > 0.9)
        for answers, knows in zip((before, after), known, strict=True):
            answers.append(knows or draw.random() < 0.25)
    plain, fair = flips(before, after), flips(before, after, chance=0.25)
    assert plain.lost > 0.18  # .1 * 3/4 + .6 * 3/16
    assert fair.lost == pytest.approx(0.1, abs=0.01)
    assert fair.gained == pytest.approx(0.1, abs=0.01)
