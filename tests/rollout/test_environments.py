"""Prompts and their verifier, built in and one's own."""

import json
import sys
from pathlib import Path

import pytest

from framework.errors import DataError
from framework.rollout.environments import ReasoningGym, read
from framework.rollout.pool import Limits, Pool, Question


class Sums:
    """An environment of one's own: nothing but the two methods."""

    def __init__(self, largest):
        self.largest = largest

    def rows(self, split):
        first = 0 if split == "train" else 100
        return [{"prompt": f"{first}+{n}=", "answer": first + n} for n in range(self.largest)]

    def score(self, answer, row):
        return float(int(answer) == row["answer"])


def test_reasoning_gym_rows_ask_and_do_not_leak():
    pytest.importorskip("reasoning_gym")
    settings = {"min_words": 3, "max_words": 6}
    gym = ReasoningGym("word_sequence_reversal", settings, train=40, held_out=10)
    train, held_out = read(gym, "train"), read(gym, "held_out")
    assert (len(train), len(held_out)) == (40, 10)
    assert train[0]["prompt"] == [{"role": "user", "content": train[0]["question"]}]
    assert gym.score(train[0]["answer"], train[0]) == 1.0
    for name in ("question", "answer"):
        assert not {row[name] for row in train} & {row[name] for row in held_out}
    again = ReasoningGym("word_sequence_reversal", settings, train=40, held_out=10)
    assert json.dumps(again.rows("train")) == json.dumps(train)
    other = ReasoningGym("word_sequence_reversal", settings, train=40, held_out=10, seed=1)
    assert not {row["question"] for row in train} & {row["question"] for row in other.rows("train")}


def test_ones_own_environment_gives_rows_here_and_scores_there(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    rows = read(Sums(3), "held_out")
    pool = Pool("test_environments.Sums", {"largest": 3}, limits=Limits(20.0))
    judged = pool.judge([Question("101", rows[1]), Question("7", rows[1]), Question("seven", rows[1])])
    pool.close()
    assert judged.values[:2] == [1.0, 0.0]
    assert judged.failures == {"exception": 1}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty"),
        ([{"prompt": "a"}, {"question": "b"}], r"rows\('train'\)\[1\] has prompt=None"),
        ([{"prompt": []}], "expected a text or a list of messages"),
        ([{"prompt": "a", "answer": {1, 2}}], "cannot be written as JSON"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused(rows, words):
    class Given:
        def rows(self, split):
            return rows

        def score(self, answer, row):
            return 0.0

    with pytest.raises(DataError, match=words):
        read(Given(), "train")
