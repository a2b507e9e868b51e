"""Which examples the student answers anew, and what becomes of them."""

import numpy as np
import pytest

from framework.rollout.base import Completion, Sampling
from framework.stages.own import Own, answer_begins


class Engine:
    def weights(self):
        return iter([("w", None)])


class Rollout:
    """Answers 7, 8, 9 to everything."""

    def __init__(self):
        self.asked = []

    def update(self, weights, *, version):
        assert next(weights)[0] == "w"

    def generate(self, prompts, sampling):
        assert sampling.samples == 1
        self.asked += prompts
        return [[Completion("", (7, 8, 9), True)] for _ in prompts]


def own(share, *, tables=1, max_length=99):
    sampling = Sampling(max_new_tokens=3, samples=4)
    return Own(Engine(), Rollout(), sampling, share=share, tables=tables, max_length=max_length, seed=3)


def example(mask):
    trained = np.array([letter == "x" for letter in mask])
    return np.arange(1, len(mask) + 1, dtype=np.int32), trained


def test_the_last_answer_is_written_anew_and_alone_is_trained():
    """ ".xx..xx": the first answer is context now; a prompt goes with the example's place in the stream."""
    chosen = own(1.0)
    ((at, (ids, trained)),) = chosen(40, [(0, example("..xx..xx"))]).items()
    assert (at, ids.tolist()) == (0, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert trained.tolist() == [False] * 6 + [True] * 3
    assert [(prompt.ids, prompt.index) for prompt in chosen.rollout.asked] == [((1, 2, 3, 4, 5, 6), 40)]
    assert chosen.answered == 1


def test_plain_text_and_replay_stay_and_long_answers_are_cut():
    chosen = own(1.0, max_length=4)
    taken = chosen(0, [(0, example(".xxx")), (1, example("..x")), (0, example("...x"))])
    assert {at: ids.tolist() for at, (ids, _) in taken.items()} == {2: [1, 2, 3, 7]}


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_the_share_is_kept_and_the_choice_depends_on_the_place_alone(share):
    examples = [(0, example("..xx"))] * 2000
    whole = set(own(share)(0, examples))
    assert len(whole) == pytest.approx(2000 * share, abs=4 * (2000 * share * (1 - share)) ** 0.5)
    assert {at + 500 for at in own(share)(500, examples[:100])} == {at for at in whole if 500 <= at < 600}


def test_a_step_without_own_answers_asks_nobody():
    chosen = own(1e-9)
    assert chosen(0, [(0, example("..xx"))] * 8) == {}
    assert chosen.rollout.asked == []


def test_where_the_last_answer_begins():
    found = [answer_begins(example(mask)[1]) for mask in (".xx.x", "..xx", ".xxx", "....", "..x..")]
    assert found == [4, 2, 1, 4, 2]
