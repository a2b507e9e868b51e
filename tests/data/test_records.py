"""Every format gives the same conversation; every malformed row is refused for its own reason."""

import contextlib
import json

import pytest

from framework.data import formats
from framework.data.records import FORMATS, RowError, parse


def detect(rows):
    return formats.detect(rows, FORMATS)


def turns(record):
    return [(m.role, m.content, m.train) for m in record.messages]


USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
EXPECTED = [("user", "Hi", False), ("assistant", "Hello", True)]

SAME_CONVERSATION = [
    ("messages", {"messages": [USER, ANSWER]}),
    ("messages", {"conversations": [USER, ANSWER]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]}),
    ("prompt_completion", {"prompt": [USER], "completion": [ANSWER]}),
    ("alpaca", {"instruction": "Hi", "output": "Hello"}),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello", "system": "", "history": []}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
]


@pytest.mark.parametrize(("format", "row"), SAME_CONVERSATION)
def test_formats_are_detected_and_give_the_same_conversation(format, row):
    assert detect([row]) == format
    assert turns(parse(row, format)) == EXPECTED


def test_text_is_trained_whole_and_prompts_are_not():
    assert parse({"text": "abc"}, "text").trained_from == 0
    record = parse({"prompt": "two and two is", "completion": " four"}, "prompt_completion")
    assert record.text == "two and two is four"
    assert record.text[record.trained_from :] == " four"


def test_weight_zero_and_turns_in_the_prompt_are_not_trained():
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}
    assert [m.train for m in parse(row, "messages").messages] == [False, False, False, True]
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert [m.train for m in parse(row, "prompt_completion").messages] == [False, False, False, True]


def test_alpaca_takes_system_history_and_input():
    row = {"system": "S", "history": [["a", "b"]], "instruction": "Hi", "input": "there", "output": "Hello"}
    assert turns(parse(row, "alpaca")) == [
        ("system", "S", False),
        ("user", "a", False),
        ("assistant", "b", True),
        ("user", "Hi\nthere", False),
        ("assistant", "Hello", True),
    ]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def test_tool_calls_mean_the_same_in_openai_and_sharegpt_form():
    openai = {
        "tools": [TOOL],
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [{"function": {**CALL["function"]}}]},
            {"role": "tool", "content": "2"},
            ANSWER,
        ],
    }
    as_text = json.loads(json.dumps(openai))
    as_text["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1}'
    sharegpt = {
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Hello"},
        ],
    }
    first = parse(openai, "messages")
    assert first.messages[1].extra["tool_calls"] == [CALL]
    assert first.tools == (TOOL,)
    assert parse(as_text, "messages") == first
    assert parse(sharegpt, "sharegpt") == first


def talk(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


MALFORMED = [
    ("messages", [], "not an object"),
    ("messages", "text", "not an object"),
    ("messages", None, "not an object"),
    ("messages", {}, "empty"),
    ("messages", {"text": "a"}, "missing field"),
    ("messages", {"messages": None}, "null"),
    ("messages", {"messages": "a"}, "wrong type"),
    ("messages", {"messages": []}, "empty"),
    ("messages", {"messages": ["a"]}, "wrong type"),
    ("messages", {"messages": [{"content": "a"}]}, "missing field"),
    ("messages", {"messages": [{"role": "user"}, ANSWER]}, "missing field"),
    ("messages", {"messages": [{"role": "user", "content": None}, ANSWER]}, "null"),
    ("messages", {"messages": [{"role": "user", "content": 3}, ANSWER]}, "wrong type"),
    ("messages", {"messages": [{"role": "user", "content": " \n"}, ANSWER]}, "empty"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]}, "empty"),
    ("messages", {"messages": [{"role": "robot", "content": "a"}, ANSWER]}, "unknown role"),
    ("messages", {"messages": [{"role": ["user"], "content": "a"}, ANSWER]}, "unknown role"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": 0.5}]}, "wrong type"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": True}]}, "wrong type"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": 0}]}, "no trained turn"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "wrong type"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": "a\x00b"}]}, "NUL character"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": "a\ud800b"}]}, "lone surrogate"),
    ("messages", {"messages": [USER, {**ANSWER, "tool_calls": "add"}]}, "wrong type"),
    ("messages", {"messages": [USER, {**ANSWER, "tool_calls": [{"id": 1}]}]}, "wrong type"),
    ("messages", {"messages": [USER, ANSWER], "tools": {"name": "add"}}, "wrong type"),
    ("messages", {"messages": [USER, ANSWER], "tools": "add("}, "wrong type"),
    ("messages", talk("user"), "no assistant turn"),
    ("messages", talk("system"), "no assistant turn"),
    ("messages", talk("assistant"), "role order"),
    ("messages", talk("assistant", "user"), "role order"),
    ("messages", talk("user", "user", "assistant"), "role order"),
    ("messages", talk("user", "assistant", "assistant"), "role order"),
    ("messages", talk("user", "system", "assistant"), "role order"),
    ("messages", talk("user", "assistant", "tool", "assistant"), "role order"),
    ("messages", talk("user", "assistant", "user"), "role order"),
    ("prompt_completion", {"prompt": "a"}, "missing field"),
    ("prompt_completion", {"prompt": "a", "completion": None}, "null"),
    ("prompt_completion", {"prompt": "a", "completion": [ANSWER]}, "wrong type"),
    ("prompt_completion", {"prompt": "a", "completion": 3}, "wrong type"),
    ("prompt_completion", {"prompt": "a", "completion": ""}, "empty"),
    ("prompt_completion", {"prompt": "", "completion": "a"}, "empty"),
    ("prompt_completion", {"prompt": [USER, ANSWER], "completion": []}, "no trained turn"),
    ("alpaca", {"instruction": "a"}, "missing field"),
    ("alpaca", {"instruction": "a", "output": ""}, "empty"),
    ("alpaca", {"instruction": ["a"], "output": "b"}, "wrong type"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]}, "wrong type"),
    ("alpaca", {"instruction": "a", "output": "b", "history": "c"}, "wrong type"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "missing field"),
    ("sharegpt", {"conversations": ["hi"]}, "wrong type"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]}, "unknown role"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "no assistant turn"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "add("}]}, "wrong type"),
    ("text", {"text": None}, "null"),
    ("text", {"text": 3}, "wrong type"),
    ("text", {"text": "  "}, "empty"),
    ("text", {"text": "\udfff"}, "lone surrogate"),
]


@pytest.mark.parametrize(("format", "row", "reason"), MALFORMED)
def test_malformed_rows_are_refused_for_their_reason(format, row, reason):
    with pytest.raises(RowError) as caught:
        parse(row, format)
    assert caught.value.reason == reason
    assert len(caught.value.detail) > 8


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [None, 3, 2.5, True, "x", "", [], [None], [[]], [3], {}, {"role": 1}])
def test_no_type_in_any_field_escapes_as_another_error(format, value):
    """Whatever stands where, the answer is a record or a RowError."""
    fields = ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system"]
    good = dict.fromkeys([*fields, "history", "tools", "text"], "x")
    good |= {"messages": [USER, ANSWER], "history": [], "tools": []}
    good["conversations"] = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    for field in good:
        with contextlib.suppress(RowError):
            parse({**good, field: value}, format)


def test_first_rows_must_agree():
    with pytest.raises(RowError, match=r"messages \(row 1\) and text \(row 3\)"):
        detect([{"messages": []}, {"id": 3}, {"text": "a"}])
    assert detect([{"id": 3}, 4, {"text": "a"}]) == "text"
    assert detect([{"id": 3}]) is None
