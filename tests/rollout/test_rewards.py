"""Rewards pay for what is right and for nothing else."""

from framework.rollout.base import Completion
from framework.rollout.rewards import verified


def test_partial_credit_and_endless_answers_earn_nothing():
    """Scores 1, 0.9, 1 and 0; the third never ended. Only the first is an answer that is right."""
    scores = {"right": 1.0, "nearly": 0.9, "wrong": 0.0}
    rows = [{"answer": "right"}] * 4
    reward = verified(lambda answer, row: scores[answer], rows)
    completions = [
        Completion("right", (5, 2), True),
        Completion("nearly", (6, 2), True),
        Completion("right", (5, 5), False),
        Completion("wrong", (7, 2), True),
    ]
    assert reward(completions).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_each_completion_is_judged_by_the_row_at_its_place():
    reward = verified(lambda answer, row: float(answer == row["answer"]), [{"answer": "a"}, {"answer": "b"}])
    assert reward([Completion("a", (1,), True), Completion("b", (1,), True)]).tolist() == [1.0, 1.0]
    assert reward([Completion("b", (1,), True), Completion("a", (1,), True)]).tolist() == [0.0, 0.0]
