"""Rows of a probe that are trained on are found by their tokens and by what they say."""

import json

import pytest
import tiny

from framework.data import answers, leaks, prompts, tables
from framework.data.sources import Source


@pytest.fixture
def read(tmp_path):
    words = tiny.tokenizer()
    options = dict(tokenizer=words, max_length=200, cache_dir=tmp_path / "cache")

    def table(name, rows, prepare=tables.prepare, **more):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare([Source(str(path))], **options, **more)[0]

    def find(probe, trained, rows=None):
        rows = range(len(probe)) if rows is None else rows
        return leaks.find(probe, rows, trained, words, cache_dir=tmp_path / "cache")

    return table, find


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_the_same_row_is_found_at_its_place_and_others_are_not(read):
    table, find = read
    probe = table("probe", [chat("Who?", "Nobody at all."), chat("Where?", "In the house over there.")])
    trained = table("task", [chat("When?", "Now."), chat("Where?", "In the house over there.")])
    assert find(probe, trained) == [leaks.Leak(1, 1)]
    assert trained.where(1).endswith("task.jsonl:2")
    assert find(probe, trained, rows=[0]) == []


def test_case_spaces_and_punctuation_do_not_hide_a_row(read):
    table, find = read
    probe = table(
        "probe", [{"text": "The road to the upper farm was gone."}, {"text": "It rained for days."}]
    )
    trained = table("task", [{"text": "the ROAD to  the upper farm -- was gone!"}])
    assert find(probe, trained) == [leaks.Leak(0, 0)]


def test_a_part_of_a_row_is_another_row(read):
    table, find = read
    probe = table("probe", [{"text": "The road was gone. The bridge was not."}])
    assert find(probe, table("task", [{"text": "The road was gone."}])) == []


def test_both_answers_of_a_pair_are_looked_at(read):
    table, find = read
    probe = table("probe", [chat("Where?", "There."), chat("Who?", "She.")])
    pairs = [
        {"prompt": "How?", "chosen": "So.", "rejected": "Not so."},
        {"prompt": "Who?", "chosen": "He.", "rejected": "She."},
    ]
    rows = [{k: [{"role": "user", "content": row["prompt"]}] if k == "prompt" else
             [{"role": "assistant", "content": v}] for k, v in row.items()} for row in pairs]  # fmt: skip
    trained = table("pairs", rows, prepare=answers.prepare_comparisons, truncation="error")
    assert find(probe, trained) == [leaks.Leak(1, 1)]


def test_a_question_is_found_wherever_it_is_asked(read):
    """As a prompt of reinforcement learning or of a pair, and before the answer of a conversation."""
    table, find = read

    def read_prompts(sources, *, max_length, **options):
        return prompts.prepare(sources, max_prompt_tokens=max_length, **options)

    def questions(name, *asked):
        return table(name, [{"prompt": chat(one, "")["messages"][:1]} for one in asked], read_prompts)

    probe = questions("probe", "Where?", "Who?", "How far is it to the house?")
    assert find(probe, questions("rl", "When?", "who")) == [leaks.Leak(1, 1)]
    asked, there, here = *chat("Where?", "There.")["messages"], chat("", "Here.")["messages"][1]
    pair = {"prompt": [asked], "chosen": [there], "rejected": [here]}
    pairs = table("pairs", [pair], prepare=answers.prepare_comparisons, truncation="error")
    assert find(probe, pairs) == [leaks.Leak(0, 0)]
    chats = table("chats", [chat("Where? Who?", "She."), chat("Who?", "Where?")])
    assert find(probe, chats) == [leaks.Leak(1, 1)]
    longer = table("longer", [{"messages": chat("Who?", "She.")["messages"] + [asked, there]}])
    assert find(probe, longer) == [leaks.Leak(1, 0)]
    assert find(probe, table("text", [{"text": "Where?"}])) == []


def test_what_was_found_is_kept_and_a_damaged_record_is_made_again(read, tmp_path):
    table, find = read
    probe = table("probe", [{"text": "It rained for days."}])
    trained = table("task", [{"text": "It rained for days!"}])
    assert find(probe, trained) == [leaks.Leak(0, 0)]
    (kept,) = (tmp_path / "cache" / "leaks").iterdir()
    kept.write_text("[[0, 5]]")
    assert find(probe, trained) == [leaks.Leak(0, 5)]
    kept.write_text("{")
    assert find(probe, trained) == [leaks.Leak(0, 0)]
