"""Prompts end where an answer begins, keep their row, and come in an order that a seed decides."""

import datetime

import pyarrow
import pyarrow.parquet
import pytest

from framework.data import prompts
from framework.data.prompts import Prompts
from framework.data.records import RowError, parse_prompt
from framework.data.sources import Source
from framework.errors import ConfigError, DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
TOOL = {"role": "tool", "content": "2"}
RENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def prepare(tokenizer, tmp_path, *paths, **settings):
    wanted = [path if isinstance(path, Source) else Source(path) for path in paths]
    settings = {"max_prompt_tokens": 64, "cache_dir": tmp_path / "cache", **settings}
    return prompts.prepare(wanted, tokenizer=tokenizer, **settings)


SAME = [
    {"prompt": [USER]},
    {"prompt": [USER, ANSWER]},
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
    {"messages": [USER]},
    {"messages": [USER, ANSWER]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"instruction": "Hi", "output": "Hello"},
]


@pytest.mark.parametrize("row", SAME)
def test_every_format_asks_the_same_and_keeps_its_row(tokenizer, tmp_path, write, row):
    row = {**row, "answer": "4", "nested": {"a": [1, None, "é"]}}
    [table] = prepare(tokenizer, tmp_path, write("ask.jsonl", [row]))
    [prompt] = Prompts([table], seed=0).take(0, 1)
    assert tokenizer.decode(prompt.ids) == RENDERED
    assert prompt.row == row


def test_earlier_answers_and_tool_calls_stay_in_the_prompt():
    record = parse_prompt({"messages": [USER, ANSWER, USER, CALL, TOOL, ANSWER]}, "messages")
    assert [m.role for m in record.messages] == ["user", "assistant", "user", "assistant", "tool"]
    assert not any(m.train for m in record.messages)


def test_text_prompts_begin_once_and_do_not_end(tokenizer, bos_tokenizer, tmp_path, write):
    path = write("ask.jsonl", [{"prompt": "two and two"}, {"prompt": "<s>two and two"}])
    [table] = prepare(bos_tokenizer, tmp_path, path)
    one, two = Prompts([table], seed=0, shuffle=False).take(0, 2)
    assert bos_tokenizer.decode(one.ids) == "<s>two and two"
    assert one.ids == two.ids
    [table] = prepare(tokenizer, tmp_path, path)
    assert tokenizer.decode(Prompts([table], seed=0, shuffle=False).take(0, 1)[0].ids) == "two and two"


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"prompt": 3}, "prompt", "wrong type"),
        ({"prompt": " "}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [ANSWER]}, "prompt", "empty"),
        ({"prompt": [USER, USER]}, "prompt", "role order"),
        ({"prompt": [{"role": "system", "content": "a"}]}, "prompt", "role order"),
        ({"messages": [USER, ANSWER, ANSWER]}, "messages", "role order"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "empty"),
    ],
)
def test_what_nobody_can_answer_is_refused(row, format, reason):
    with pytest.raises(RowError) as caught:
        parse_prompt(row, format)
    assert caught.value.reason == reason


def test_long_prompts_are_refused_or_counted_and_never_cut(tokenizer, tmp_path, write):
    path = write("ask.jsonl", [{"prompt": "Hi"}, {"prompt": " yes" * 100}])
    with pytest.raises(DataError, match=r"ask.jsonl:2: a prompt of \d+ tokens, more than the 64"):
        prepare(tokenizer, tmp_path, path)
    [table] = prepare(tokenizer, tmp_path, path, truncation="drop")
    assert (table.counts.rows, table.counts.kept, table.counts.dropped) == (2, 1, {"over-long": 1})
    with pytest.raises(ConfigError, match=r"data\.truncation=left"):
        prepare(tokenizer, tmp_path, path, truncation="left")


def test_the_stream_counts_on_and_every_epoch_has_every_prompt(tokenizer, tmp_path, write):
    one = write("one.jsonl", [{"prompt": f"Question {i}", "id": i} for i in range(7)])
    two = write("two.jsonl", [{"prompt": f"Other {i}", "id": 7 + i} for i in range(4)])
    tables = prepare(tokenizer, tmp_path, one, two)
    stream = Prompts(tables, seed=3)
    assert len(stream) == 11
    taken = stream.take(0, 33)
    assert [prompt.index for prompt in taken] == list(range(33))
    epochs = [[prompt.row["id"] for prompt in taken[i : i + 11]] for i in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Prompts(tables, seed=3).take(15, 20) == taken[15:20]
    assert [p.row["id"] for p in Prompts(tables, seed=4).take(0, 11)] != epochs[0]
    assert [p.row["id"] for p in Prompts(tables, seed=4, shuffle=False).take(0, 11)] == list(range(11))
    assert stream.epochs(22) == 2.0
    weighted = prepare(tokenizer, tmp_path, Source(one, weight=1.0), Source(two, weight=3.0))
    others = [p.row["id"] >= 7 for p in Prompts(weighted, seed=3).take(0, 40)]
    assert sum(others) == 30


def test_values_that_json_does_not_know_become_text(tokenizer, tmp_path):
    day = datetime.date(2024, 2, 29)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Hi"], "day": [day]}), tmp_path / "ask.parquet")
    [table] = prepare(tokenizer, tmp_path, str(tmp_path / "ask.parquet"))
    assert table.row(0) == {"prompt": "Hi", "day": "2024-02-29"}


def test_rows_that_ask_nothing_are_refused_by_line(tokenizer, tmp_path, write):
    with pytest.raises(DataError, match=r"ask.jsonl:1: found fields question; .*call question prompt"):
        prepare(tokenizer, tmp_path, write("ask.jsonl", [{"question": "Hi"}]))
