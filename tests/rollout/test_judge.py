"""Several rewards, one score: weighted, counted apart, and nothing that failed becomes a zero."""

import math
import sys
from pathlib import Path

import pytest
import torch
import workers

from framework.errors import SapwoodError
from framework.rollout.base import Completion, Prompt
from framework.rollout.judge import Judge, Spec
from framework.rollout.pool import Limits
from framework.strategy.world import connect

NUMBERS = Spec("numbers", "hostile.obeys", weight=2.0)
LENGTH = Spec("length", "framework.rollout.rewards.length_penalty", {"free": 1, "per_token": 0.5})


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


def judged(world, specs, texts, *, max_failed=1.0, finished=True, tokens=2):
    judge = Judge(specs, world, workers=1, limits=Limits(timeout_s=20.0), max_failed=max_failed)
    prompts = [Prompt((1,), index, {"bonus": index}) for index in range(len(texts))]
    try:
        return judge(prompts, [Completion(text, (5,) * tokens, finished) for text in texts])
    finally:
        judge.close()


def alone():
    return connect("cpu", timeout_s=10)


def test_the_score_is_the_weighted_sum():
    """2 (1 + 0) - 1/2, 2 (1 + 1) - 1/2, and the third, whose number failed, has none."""
    said = judged(alone(), [NUMBERS, LENGTH], ["1", "1", "fails"])
    assert said.scores.tolist()[:2] == [1.5, 3.5]
    assert math.isnan(said.scores[2])
    assert said.parts["length"].tolist() == [-0.5] * 3
    assert said.failures == {"numbers": {"exception": 1}, "length": {}}
    assert said.metrics == {
        "reward/numbers": 1.5,
        "reward/length": -0.5,
        "reward_failures/timeout": 0,
        "reward_failures/crash": 0,
        "reward_failures/exception": 1,
        "reward_failures/not_a_number": 0,
    }


def test_partial_credit_and_endless_answers_can_count_nothing():
    exact = Spec("exact", "hostile.obeys", only_exact=True, only_finished=True)
    said = judged(alone(), [exact], ["1", "0.9", "nan"])
    assert said.scores.tolist()[:2] == [1.0, 0.0]
    assert math.isnan(said.scores[2])
    said = judged(alone(), [exact], ["1", "nan"], finished=False)
    assert said.scores[0] == 0.0
    assert math.isnan(said.scores[1])


def test_too_many_failures_stop_the_run_and_say_why():
    assert judged(alone(), [NUMBERS], ["fails", "1", "2", "3"], max_failed=0.25).scores.isnan().sum() == 1
    with pytest.raises(SapwoodError, match=r"(?s)numbers \(hostile.obeys\) failed on 2 of 4 .*no such luck"):
        judged(alone(), [NUMBERS], ["fails", "1", "2", "exits"], max_failed=0.25)


def on_ranks(world):
    said = judged(world, [NUMBERS, LENGTH], ["1", "fails", "3", "4", "exits"])
    return said.scores.tolist(), dict(said.failures["numbers"]), dict(said.metrics)


def test_ranks_share_the_work_and_know_all_of_it():
    first, second = workers.run(2, on_ranks)
    expected = on_ranks(alone())
    for scores, failures, metrics in (first, second):
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected[0]), equal_nan=True)
        assert (failures, metrics) == expected[1:]


def test_a_tasks_own_verifier_is_a_reward(monkeypatch):
    """By its dotted path, in its process: nothing of it is imported here."""
    pytest.importorskip("reasoning_gym")
    row = {"family": "word_sequence_reversal", "question": "a, b", "answer": "b, a", "metadata": {}}
    judge = Judge(
        [Spec("task", "framework.data.tasks.score")], alone(), workers=1, limits=Limits(60.0), max_failed=0.0
    )
    said = judge([Prompt((1,), 0, row)] * 2, [Completion("b, a", (5,), True), Completion("a", (5,), True)])
    judge.close()
    assert said.scores[0] == 1.0
    assert said.scores[1] < 1.0
