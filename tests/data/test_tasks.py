"""Procedural tasks: what is held out is held out, and the verifier's word is passed on unchanged."""

import json

import pytest

from framework.data import tasks
from framework.errors import DataError

pytest.importorskip("reasoning_gym")

REVERSAL = tasks.Family("word_sequence_reversal", {"min_words": 3, "max_words": 6})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return tasks.write(tmp_path_factory.mktemp("task"), REVERSAL, train=300, held_out=60)


def test_held_out_rows_share_no_question_and_no_answer_with_training(written):
    train, held_out = tasks.read(written.train), tasks.read(written.held_out)
    assert (len(train), len(held_out)) == (300, 60)
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert not {row["answer"] for row in train} & {row["answer"] for row in held_out}
    for rows in (train, held_out):
        assert len({row["question"] for row in rows}) == len(rows)


def test_neighbouring_seeds_give_different_items(tmp_path, written):
    """The library draws item i from Random(seed + i): our seeds 0 and 1 must not share their items."""
    other = tasks.write(tmp_path, REVERSAL, train=300, held_out=60, seed=1)
    questions = [{row["question"] for row in tasks.read(path)} for path in (written.train, other.train)]
    assert not questions[0] & questions[1]


def test_the_same_seed_writes_the_same_bytes(tmp_path, written):
    again = tasks.write(tmp_path, REVERSAL, train=300, held_out=60)
    assert again.train.read_bytes() == written.train.read_bytes()
    assert again.held_out.read_bytes() == written.held_out.read_bytes()


def test_rows_are_conversations_on_one_line_that_carry_their_verifier(written):
    row = tasks.read(written.train)[0]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"] == row["question"]
    assert row["messages"][1]["content"] == row["answer"]
    assert row["family"] == "word_sequence_reversal"
    assert "\n" not in row["question"]
    listed = row["question"].split("list of words: ")[1].split(", ")
    assert row["answer"].split(", ") == listed[::-1]


def test_score_is_the_verifiers_own():
    """ "c, b, a" is right; the verifier pays 7 / 20 for an answer of 20 characters that contains it."""
    row = {
        "family": "word_sequence_reversal",
        "question": "Reverse: a, b, c",
        "answer": "c, b, a",
        "metadata": {},
    }
    assert tasks.score("c, b, a", row) == 1.0
    assert tasks.score(" c, b, a\n", row) == 1.0
    assert tasks.score("The words: c, b, a !", row) == pytest.approx(7 / 20)
    assert tasks.score("a, b, c", row) == 0.0
    assert tasks.score("", row) == 0.0


def test_an_item_that_training_has_is_never_held_out(tmp_path, monkeypatch):
    """Training draws 0..4; held out starts at 3, so 3 and 4 leak by question, and 105 by its answer alone."""

    def draw(family, seed, *, most):
        numbers = range(5) if seed == 0 else [3, 4, 105, 7, 7, 8]
        for n in numbers:
            yield {"question": f"q{n}", "answer": f"a{n % 100}" if n < 105 else "a0", "messages": []}

    monkeypatch.setattr(tasks, "_draw", draw)
    written = tasks.write(tmp_path, REVERSAL, train=5, held_out=2)
    assert [row["question"] for row in tasks.read(written.held_out)] == ["q7", "q8"]
    assert (written.leaked, written.repeated) == (3, 1)


def test_a_family_too_small_to_hold_out_is_refused(tmp_path, monkeypatch):
    def draw(family, seed, *, most):
        yield from ({"question": f"q{n}", "answer": "yes", "messages": []} for n in range(most))

    monkeypatch.setattr(tasks, "_draw", draw)
    with pytest.raises(DataError, match=r"0 held-out items .*asked for 5 and 2"):
        tasks.write(tmp_path, REVERSAL, train=5, held_out=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family", [tasks.Family("word_reversal"), tasks.Family("word_sequence_reversal", {"most_words": 3})]
)
def test_an_unknown_family_or_setting_is_refused(tmp_path, family):
    with pytest.raises(DataError, match="reasoning-gym refuses"):
        tasks.write(tmp_path, family, train=2, held_out=1)


def test_the_majority_baseline_is_the_most_common_training_answer():
    """Training says yes, yes, no: always answering yes is right on 1 of 4 held-out rows."""

    def rows(*answers):
        return [
            {"family": "word_sequence_reversal", "question": "", "answer": a, "metadata": {}} for a in answers
        ]

    assert tasks.majority_accuracy(rows("yes", "yes", "no"), rows("yes", "no", "no", "never")) == 0.25


def test_few_shot_prompts_show_examples_as_earlier_turns(written):
    train, held_out = tasks.read(written.train), tasks.read(written.held_out)
    (prompt, *_) = tasks.few_shot(held_out, train[:2])
    assert [message["role"] for message in prompt] == ["user", "assistant"] * 2 + ["user"]
    assert prompt[-1]["content"] == held_out[0]["question"]
    assert held_out[0]["answer"] not in json.dumps(prompt)
