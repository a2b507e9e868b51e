"""Questions asked of the start model and again: who is asked when, and what counts as lost."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from framework.config.questions import Asked, Questions, compared
from framework.rollout.intervals import fall
from framework.train.retain import Cadence


class Model:
    """Knows the answers to some questions, which are numbers."""

    def __init__(self, *known):
        self.known, self.unjudged, self.asked, self.updates = set(known), set(), [], 0

    def update(self, weights, *, version):
        self.updates += 1

    def weights(self, *, without):
        return iter(())

    def assess(self, prompts):
        self.asked.append(list(prompts))
        right = [math.nan if p in self.unjudged else float(p in self.known) for p in prompts]
        return SimpleNamespace(right=torch.tensor(right, dtype=torch.float64))


def questions(model, *, identity="same", every=2):
    asked = {"sums": Asked(range(10), "same"), "words": Asked(range(10, 14), identity)}
    return Questions(model, model, model.assess, asked, cadence=Cadence(20, 4, 0), every=every)


def test_the_start_is_asked_twice_the_second_time_in_halves():
    model = Model(*range(14))
    ask = questions(model)
    ask.begin(None)
    assert model.asked == [
        list(range(10)), [0, 2, 4, 6, 8], [1, 3, 5, 7, 9],
        [10, 11, 12, 13], [10, 12], [11, 13],
    ]  # fmt: skip
    assert model.updates == 1
    falls = ask(start=True)
    assert len(model.asked) == 6  # what the start model says is known
    assert (falls["sums"].right, falls["sums"].change, falls["sums"].noise) == (1.0, 0.0, 0.0)


def test_what_changes_sides_counts_and_what_was_not_judged_does_not():
    """The start knows 0 to 5 of ten, what became of it 3 to 6; 7 and 8 are not judged: 3 of 8 lost, 1 won."""
    model = Model(0, 1, 2, 3, 4, 5)
    ask = questions(model)
    ask.begin(None)
    model.known, model.unjudged = {3, 4, 5, 6}, {7, 8}
    found = ask()["sums"]
    assert (found.right_to_wrong, found.wrong_to_right, found.questions) == (3, 1, 8)
    assert (found.right, found.change) == (0.5, 0.25)
    assert (found.change, found.low, found.high) == fall(3, 1, 8)
    assert ask()["words"].change == 0.0
    assert compared([None, True], [True, None], noise=0.0).questions == 0


def test_answers_that_differ_by_themselves_are_noise():
    model = Model(*range(10))
    ask = questions(model)
    answer = model.assess

    def forgetful(prompts):
        model.known = set(range(10)) if len(prompts) == 10 else set(range(8))
        return answer(prompts)

    ask._assess = forgetful
    ask.begin(None)
    assert ask(start=True)["sums"].noise == pytest.approx(0.2)


def test_a_resumed_run_asks_the_start_only_what_its_checkpoint_lacks():
    model = Model(0, 1, 11)
    ask = questions(model)
    ask.begin(None)
    saved = json.loads(json.dumps(ask.state_dict()))
    other = Model()  # as if it had forgotten all of it
    again = questions(other)
    again.begin(saved)
    assert (other.asked, other.updates) == ([], 0)
    assert again()["sums"].right_to_wrong == 2
    changed = questions(other, identity="other")
    other.asked.clear()
    changed.begin(saved)
    assert {prompt for prompts in other.asked for prompt in prompts} == {10, 11, 12, 13}
    assert changed()["words"].right_to_wrong == 0


def test_every_second_look_asks_and_so_do_the_first_and_the_last():
    ask = questions(Model(), every=2)
    assert [step for step in (0, 4, 8, 12, 16, 20) if ask.due(step)] == [0, 8, 16, 20]


def test_looks_are_numbered_as_they_come():
    """Against counting: dense looks in the first tenth that fall on even ones or do not."""
    for cadence in (Cadence(300, 100), Cadence(997, 30, 7), Cadence(400, 15, 10), Cadence(50, 8, 0)):
        looks = [step for step in range(cadence.steps) if cadence.due(step)]
        assert [cadence.number(step) for step in looks] == list(range(len(looks)))
