"""Rewards in processes of their own: whatever they do, every answer gets a number or a named failure."""

import math
import os
import sys
import time
from pathlib import Path

import pytest

from framework.errors import ConfigError
from framework.rollout.pool import Limits, Pool, Question


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Where hostile.py is."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


def asked(*answers, **row):
    return [Question(answer, row) for answer in answers]


@pytest.fixture
def pool():
    made = []

    def make(target, *, timeout_s=20.0, workers=1, memory_bytes=1 << 28, **keywords):
        made.append(Pool(target, keywords, workers=workers, limits=Limits(timeout_s, memory_bytes)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_answers_are_judged_in_order_by_several_processes(pool):
    judged = pool("hostile.obeys", workers=2).judge(asked("1", "2.5", "-3", "4", bonus=10))
    assert judged.values == [11.0, 12.5, 7.0, 14.0]
    assert not judged.failures
    assert judged.first == ""


@pytest.mark.parametrize(
    ("crime", "kind", "words"),
    [
        ("huge", "exception", "MemoryError"),
        ("bit_by_bit", "exception", "MemoryError"),
        ("fails", "exception", "RuntimeError: no such luck"),
        ("sys_exit", "exception", "SystemExit"),
        ("recurses", "exception", "RecursionError"),
        ("exits", "crash", "exit status 0"),
        ("kills", "crash", "SIGKILL"),
        ("fork_and_exit", "crash", "exit status 0"),
        ("garbage", "crash", "no answer"),
        ("flood", "crash", "no answer"),
        ("string", "not_a_number", "'1.0'"),
        ("nothing", "not_a_number", "None"),
        ("nan", "not_a_number", "nan"),
        ("infinite", "not_a_number", "inf"),
    ],
)
def test_a_crime_costs_its_own_answer_and_is_named(pool, crime, kind, words):
    """The neighbours are judged as if nothing had happened."""
    judged = pool("hostile.obeys").judge(asked("1", crime, "3"))
    assert judged.values[::2] == [1.0, 3.0]
    assert math.isnan(judged.values[1])
    assert judged.failures == {kind: 1}
    assert words in judged.first


def test_hanging_rewards_cost_their_time_and_no_more(pool):
    """Three ways to hang, in two processes, a second each."""
    judging = pool("hostile.obeys", timeout_s=1.0, workers=2)
    judging.judge(asked("1"))
    begin = time.monotonic()
    judged = judging.judge(asked("loop", "1", "sleep", "2", "stops", "3"))
    assert [value for value in judged.values if not math.isnan(value)] == [1.0, 2.0, 3.0]
    assert judged.failures == {"timeout": 3}
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(("crime", "value"), [("prints", 5.0), ("threads", 7.0), ("truth", 1.0)])
def test_noise_does_no_harm(pool, crime, value):
    assert pool("hostile.obeys").judge(asked(crime, "2")).values == [value, 2.0]


def test_a_child_that_returns_into_the_worker_answers_nobody(pool):
    """The parent's 6 counts; the child's 99 does not, now or later."""
    judging = pool("hostile.obeys")
    assert judging.judge(asked("forks", "2")).values == [6.0, 2.0]
    assert judging.judge(asked("3")).values == [3.0]


def test_nothing_is_left_running(pool):
    """Processes of the whole group are gone after `close`, forked ones too."""
    judging = pool("hostile.obeys")
    judging.judge(asked("forks"))
    group = judging._living[0].process.pid
    judging.close()
    left = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        left += [entry] if int(of_group) == group and state != "Z" else []
    assert not left


def test_nothing_of_this_process_environment_arrives(pool, monkeypatch):
    monkeypatch.setitem(os.environ, "SECRET_TOKEN", "x")
    (count,) = pool("hostile.environment").judge(asked("")).values
    assert 0 < count < 12


def test_a_function_is_given_what_it_names(pool):
    questions = [Question("", {}, tokens=3), Question("", {}, tokens=3, finished=False)]
    assert pool("hostile.asks", scale=2.0).judge(questions).values == [6.0, -1.0]


def test_a_batched_reward_judges_many_and_fails_for_all(pool):
    judging = pool("hostile.batched", factor=2.0)
    questions = [Question("abc", {}), Question("a", {}), Question("abc", {}, finished=False)]
    assert judging.judge(questions).values == [6.0, 2.0, 0.0]
    judged = judging.judge(asked("a", "fails"))
    assert all(math.isnan(value) for value in judged.values)
    assert judged.failures == {"exception": 2}


def test_a_batch_of_another_length_is_a_failure(pool):
    judged = pool("hostile.wrong_count").judge(asked("a", "b"))
    assert judged.failures == {"exception": 2}
    assert "1 values for 2 answers" in judged.first


def test_a_class_is_made_once_and_scores(pool):
    assert pool("hostile.Task", right="b").judge(asked("a", "b", "b")).values == [0.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("target", "keywords", "words"),
    [
        ("nowhere.at_all", {}, "ModuleNotFoundError"),
        ("hostile.missing", {}, "AttributeError"),
        ("hostile.asks", {}, "needs scale, which is not set"),
        ("hostile.Task", {"wrong": 1}, "unexpected keyword"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(pool, target, keywords, words):
    with pytest.raises(ConfigError, match=words):
        pool(target, **keywords).judge(asked("1"))


def test_no_questions_start_no_process(pool):
    judging = pool("nowhere.at_all")
    assert judging.judge([]).values == []
