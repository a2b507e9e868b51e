"""Evaluation by answering, in numbers worked by hand."""

import math
from collections import Counter

import pytest
import torch

from framework.rollout.assess import Assessor, distinct
from framework.rollout.base import Completion, Prompt, Sampling
from framework.rollout.judge import Judged

PROMPTS = [Prompt((1, 2), 0, {"answer": 7}), Prompt((3,), 1)]


class Scripted:
    """A rollout that says what it was told."""

    def __init__(self, *answers):
        self.answers = [list(group) for group in answers]

    def generate(self, prompts, sampling):
        assert [prompt.index for prompt in prompts] == [0, 1]
        assert sampling.samples == 2
        return self.answers


def judge(prompts, completions):
    """The number that the text is."""
    scores = torch.tensor([float(c.text) for c in completions], dtype=torch.float64)
    parts = {"task": scores / 2, "style": scores}
    return Judged(scores, parts, {"task": Counter()}, {"reward/task": 1.5, "reward_failures/crash": 0.0})


def test_an_assessment():
    """Scores 2, 2, 1, NaN; the verifier's are half: right, right but endless, wrong, not judged. Lengths 4,
    3, 2, 1; runs of three: 5 5 5 and 5 5 5 of the first are one of two, of the second one of one, others
    have none. Nats: 0.5 of each of ten tokens."""
    rollout = Scripted(
        [Completion("2", (5,) * 4, True, (-0.5,) * 4), Completion("2", (5,) * 3, False, (-0.5,) * 3)],
        [Completion("1", (5,) * 2, True, (-0.5,) * 2), Completion("nan", (5,), True, (-0.5,))],
    )
    told = Assessor(rollout, PROMPTS, judge, Sampling(4, samples=2), decode=str, verifier="task", shown=3)()
    assert told.metrics == pytest.approx(
        {
            "score": 5 / 3,
            "accuracy": 1 / 3,
            "failed_share": 0.25,
            "reward/task": 1.5,
            "answer_tokens": 2.5,
            "finished_share": 0.75,
            "distinct_runs": 0.75,
            "nats_per_token": 0.5,
        }
    )
    assert told.right.tolist()[:3] == [1.0, 0.0, 0.0]
    assert math.isnan(told.right[3])
    assert told.samples[0] == {
        "prompt": "(1, 2)",
        "reference": "7",
        "answer": "2",
        "score": 2.0,
        "finished": True,
    }
    assert [row["answer"] for row in told.samples] == ["2", "2", "1"]
    assert "reference" not in told.samples[2]


def test_a_score_that_is_not_known_is_shown_as_none():
    rollout = Scripted([Completion("nan", (5,), True)] * 2, [Completion("1", (5,), True)] * 2)
    told = Assessor(rollout, PROMPTS, judge, Sampling(4, samples=2), decode=str)()
    assert told.samples[0]["score"] is None
    assert told.right is None
    assert "accuracy" not in told.metrics
    assert not {"nats_per_token", "distinct_runs"} & set(told.metrics)


@pytest.mark.parametrize(("ids", "share"), [((1, 2, 3, 4), 1.0), ((1, 1, 1, 1, 1), 1 / 3), ((1, 2), None)])
def test_distinct_runs(ids, share):
    assert distinct(ids) == share
