"""Rows of every kind as text to imitate: what of them it is, and that it reads back as what was learnt."""

import pytest

from framework.data.records import parse
from framework.data.rehearsed import record, row_of

ASK = {"role": "user", "content": "2 + 2?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


WRONG = says("5", weight=0)
GIVEN = {"role": "tool", "content": "4", "name": "add"}
TURNS = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [{"role": "system", "content": "Be short."}, ASK, says("4")]}, "messages"),
        ({"messages": [ASK, WRONG, ASK, says("4"), ASK, WRONG, ASK, says("four")]}, "messages"),
        ({"messages": [ASK, says("", tool_calls=[CALL]), GIVEN, says("4")], "tools": [{"name": "add"}]},
         "messages"),
        ({"prompt": "2 + 2 = ", "completion": "4"}, "prompt_completion"),
        ({"prompt": [ASK], "completion": [says("4")]}, "prompt_completion"),
        ({"instruction": "Add.", "input": "2, 2", "output": "4", "history": [["1, 1", "2"]]}, "alpaca"),
        ({"conversations": TURNS}, "sharegpt"),
        ({"text": "Two and two is four."}, "text"),
    ],
)  # fmt: skip
def test_what_was_learnt_reads_back_as_the_same_record(row, format):
    learnt = record(row, format)
    assert learnt == parse(row, format)
    kept = row_of(learnt)
    assert parse({**kept, "row": "0" * 32, "from": "a.jsonl:1", "tokens": 4}, "text" if "text" in kept else
                 "prompt_completion") == learnt  # fmt: skip


@pytest.mark.parametrize(
    ("row", "format", "answer"),
    [
        ({"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}, "preference", "2 + 2 = 4"),
        ({"prompt": "2 + 2 = ", "responses": ["5", "4", "22"], "scores": [0, 1, 0]}, "ranking", "2 + 2 = 4"),
        ({"prompt": "2 + 2 = ", "completion": "4", "label": True}, "unpaired", "2 + 2 = 4"),
        ({"prompt": "2 + 2 = ", "completion": "5", "label": False}, "unpaired", None),
        ({"prompt": "2 + 2 = ", "answer": "4"}, "prompt", None),
        ({"messages": [ASK]}, "messages", None),
    ],
)
def test_of_judged_answers_the_best_is_imitated_and_of_a_question_without_an_answer_nothing(
    row, format, answer
):
    found = record(row, format)
    assert (found and found.text) == answer
    if found is not None:
        assert row_of(found) == {"prompt": "2 + 2 = ", "completion": "4"}


def test_a_chat_that_was_chosen_is_imitated_in_its_own_turns_only():
    row = {"chosen": [ASK, says("4")], "rejected": [ASK, says("5")]}
    assert row_of(record(row, "preference")) == {"prompt": [ASK], "completion": [says("4")]}
