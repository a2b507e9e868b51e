"""Rewards pay for what is right and for nothing else."""

import subprocess
import sys

import pytest

from framework.rollout import rewards
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


@pytest.mark.parametrize(
    ("judged", "value"),
    [
        (rewards.exact(" 12 \n", {"answer": "12"}), 1),
        (rewards.exact("12.", {"answer": "12"}), 0),
        (rewards.exact("PARIS", {"capital": "Paris"}, field="capital", ignore_case=True), 1),
        (rewards.exact("<a>1</a> no, <a>2</a>", {"answer": "2"}, inside="a"), 1),
        (rewards.exact("2", {"answer": "2"}, inside="a"), 0),
        (rewards.exact("<a>2", {"answer": "2"}, inside="a"), 0),
        (rewards.contains("it is Paris, then", {"answer": "Paris"}), 1),
        (rewards.contains("it is paris", {"answer": "Paris"}), 0),
        (rewards.regex("a\nb", pattern="a.b"), 1),
        (rewards.regex("ab", pattern="^b"), 0),
        (rewards.format_tags("<think>why\nnot</think>\n<answer>4</answer>\n"), 1),
        (rewards.format_tags("<answer>4</answer><think>x</think>"), 0),
        (rewards.format_tags("well, <think>x</think><answer>4</answer>"), 0),
        (rewards.format_tags("<think>x</think><answer>4</answer><answer>5</answer>"), 0),
        (rewards.format_tags("<think>x<think></think><answer>4</answer>"), 0),
        (rewards.format_tags("<a>1</a>", tags=["a"]), 1),
        (rewards.length_penalty(12, free=10, per_token=0.5), -1),
        (rewards.length_penalty(9, free=10, per_token=0.5), 0),
        (rewards.overlong(16, max_tokens=20, buffer=4), 0),
        (rewards.overlong(17, max_tokens=20, buffer=4), -0.25),
        (rewards.overlong(20, max_tokens=20, buffer=4), -1),
        (rewards.overlong(25, max_tokens=20, buffer=4), -1),
        (rewards.repetition_penalty("a b c d"), 0),
        (rewards.repetition_penalty("a A a a a", words=3, most=3.0), -2),
        (rewards.repetition_penalty("a b"), 0),
    ],
)
def test_what_answers_are_worth(judged, value):
    """overlong: 20 - 4 = 16 is free, each of the next four costs 1/4. Of the three runs "a a a" one is
    different from the others: 1 - 1/3 of 3 is 2."""
    assert judged == pytest.approx(value)


def test_a_field_that_is_not_there_is_an_error_and_no_zero():
    with pytest.raises(KeyError, match="no 'solution'; it has answer"):
        rewards.exact("1", {"answer": "1"}, field="solution")


def test_a_buffer_without_room_is_refused():
    with pytest.raises(ValueError, match="buffer=0 must be from 1"):
        rewards.overlong(1, max_tokens=4, buffer=0)


@pytest.mark.parametrize(
    ("said", "right", "value"),
    [
        ("so it is $\\frac{2}{6}$", "1/3", 1),
        ("\\boxed{\\frac13}", "\\frac{1}{3}", 1),
        ("the answer is 0.33", "1/3", 0),
        ("I do not know", "7", 0),
        ("7", "7", 1),
    ],
)
def test_mathematics_is_compared_as_mathematics(said, right, value):
    pytest.importorskip("math_verify")
    assert rewards.math(said, {"answer": right}) == value


def test_rewards_import_no_torch():
    """Their processes start fast and small."""
    code = "import sys, framework.rollout.rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
