"""Answers are told from their prompt: by fields, by turns, by tokens; and truncation never eats either."""

import numpy as np
import pytest

from framework.data import answers, preferences
from framework.data.fields import RowError
from framework.data.formats import FIELDS, detect
from framework.data.preferences import Pair, parse_comparison, parse_labelled
from framework.data.sources import Source
from framework.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def compared(tokenizer, tmp_path, write, rows, **settings):
    path = rows if isinstance(rows, str) else write("pairs.jsonl", rows)
    settings = {"max_length": 256, "cache_dir": tmp_path / "cache", **settings}
    [table] = answers.prepare_comparisons([Source(path)], tokenizer=tokenizer, **settings)
    return table


def shown(tokenizer, table, row):
    """[prompt, answers...] as text, with ⟦⟧ around what is trained."""
    found = table.judged(row)
    texts = [tokenizer.decode(found.prompt.tolist())]
    for ids, trained in zip(found.ids, found.trained, strict=True):
        text, on = "", False
        for token, mark in zip(ids.tolist(), trained.tolist(), strict=True):
            text, on = (text + "⟧⟦"[mark] if mark != on else text) + tokenizer.decode([token]), mark
        texts.append(text + ("⟧" if on else ""))
    return texts


SAME_PAIR = [
    {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("Help")]},
    {"prompt": [user("Hi")], "chosen": "Hello", "rejected": "Help"},
    {"prompt": "Hi", "chosen": [assistant("Hello")], "rejected": [assistant("Help")]},
    {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("Help")]},
    {"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("Help")]},
    {"prompt": [user("Hi")], "responses": ["Hello", "Help"]},
    {"prompt": [user("Hi")], "responses": [[assistant("Help")], "Hello"], "ranks": [2, 1]},
]


@pytest.mark.parametrize("row", SAME_PAIR)
def test_every_way_of_writing_a_pair_gives_the_same_tokens(tokenizer, tmp_path, write, row):
    """Both answers are trained whole, also where they begin alike, and end with the end of the turn."""
    table = compared(tokenizer, tmp_path, write, [row])
    prompt, *texts = shown(tokenizer, table, 0)
    assert prompt == CHAT
    [[better, worse]] = table.judged(0).pairs.tolist()
    assert [texts[better], texts[worse]] == ["⟦Hello<|im_end|>⟧", "⟦Help<|im_end|>⟧"]
    assert table.lengths[0] == table.prompts[0] + table.sizes(0).sum() == len(table.example(0)[0])
    assert table.trained[0] == table.learnt(0).sum() == table.example(0)[1].sum()


def test_a_text_pair_with_a_prompt_is_trained_after_it(tokenizer, tmp_path, write):
    rows = [{"prompt": "The capital of France is", "chosen": " Paris", "rejected": " Paradise"}]
    table = compared(tokenizer, tmp_path, write, rows)
    assert shown(tokenizer, table, 0) == [
        "The capital of France is",
        "⟦ Paris<|im_end|>⟧",
        "⟦ Paradise<|im_end|>⟧",
    ]


def test_whole_texts_part_where_their_tokens_do(tokenizer, bos_tokenizer, tmp_path, write):
    """' Paris' and ' Paradise' share the tokens of their common beginning: it counts to the prompt."""
    rows = [{"chosen": "The capital is Paris", "rejected": "The capital is three"}]
    table = compared(tokenizer, tmp_path, write, rows)
    prompt, chosen, rejected = shown(tokenizer, table, 0)
    assert prompt.startswith("The capital is")
    assert prompt + chosen.strip("⟦⟧") == "The capital is Paris<|im_end|>"
    assert prompt + rejected.strip("⟦⟧") == "The capital is three<|im_end|>"
    first = [ids[0] for ids in table.judged(0).ids]
    assert first[0] != first[1]
    assert all(mask.all() for mask in table.judged(0).trained)
    one_in_other = [{"chosen": "one two", "rejected": "one two three"}]
    table = compared(bos_tokenizer, tmp_path, write, one_in_other)
    assert shown(bos_tokenizer, table, 0)[1] == "⟦</s>⟧"


def test_shared_turns_are_the_prompt_and_later_user_turns_are_not_trained(tokenizer, tmp_path, write):
    start = [user("Hi"), assistant("Hello"), user("And?")]
    rows = [
        {
            "chosen": [*start, assistant("Well"), user("one"), assistant("two")],
            "rejected": [*start, assistant("three")],
        }
    ]
    prompt, chosen, rejected = shown(tokenizer, compared(tokenizer, tmp_path, write, rows), 0)
    assert prompt.endswith("And?<|im_end|>\n<|im_start|>assistant\n")
    assert chosen == (
        "⟦Well<|im_end|>⟧\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n⟦two<|im_end|>⟧"
    )
    assert rejected == "⟦three<|im_end|>⟧"


def test_rankings_make_all_pairs_and_ties_none():
    """Best first: 3 pairs of 3 answers. Scores 1, 3, 1: two pairs, the tie makes none; margins are 2."""
    row = {"prompt": "Hi", "responses": [" a", " b", " c"]}
    assert parse_comparison(row, "ranking").pairs == (Pair(0, 1), Pair(0, 2), Pair(1, 2))
    assert parse_comparison({**row, "ranks": [3, 2, 1]}, "ranking").pairs == (
        Pair(1, 0),
        Pair(2, 0),
        Pair(2, 1),
    )
    scored = {**row, "scores": [1, 3.0, 1]}
    assert parse_comparison(scored, "ranking").pairs == (Pair(1, 0), Pair(1, 2))
    with_margins = parse_comparison(scored, "ranking", margin_from_scores=True)
    assert with_margins.pairs == (Pair(1, 0, 2.0), Pair(1, 2, 2.0))


def test_margins_are_the_rows_own_or_of_scores_on_request(tokenizer, tmp_path, write):
    pair = {"prompt": "Hi", "chosen": " a", "rejected": " b"}
    rows = [pair, {**pair, "margin": 0.5}, {**pair, "score_chosen": 3, "score_rejected": 1.5}]
    table = compared(tokenizer, tmp_path, write, rows)
    assert [table.judged(row).margins.tolist() for row in range(3)] == [[0], [0.5], [0]]
    with pytest.raises(DataError, match=r"pairs.jsonl:1: no field score_chosen"):
        compared(tokenizer, tmp_path, write, rows, margin_from_scores=True)
    table = compared(tokenizer, tmp_path, write, rows[1:], margin_from_scores=True)
    assert [table.judged(row).margins.tolist() for row in range(2)] == [[0.5], [1.5]]


PAIR = {"prompt": "Hi", "chosen": " a", "rejected": " b"}
MALFORMED = [
    ("preference", 3, "not an object"),
    ("preference", {"chosen": "a"}, "missing field"),
    ("preference", {**PAIR, "rejected": None}, "null"),
    ("preference", {**PAIR, "rejected": [assistant("b")]}, "wrong type"),
    ("preference", {**PAIR, "prompt": 3}, "wrong type"),
    ("preference", {**PAIR, "chosen": " "}, "empty"),
    ("preference", {**PAIR, "chosen": 3, "rejected": 4}, "wrong type"),
    ("preference", {**PAIR, "rejected": " a"}, "same answers"),
    ("preference", {"chosen": "a", "rejected": "a"}, "same answers"),
    ("preference", {**PAIR, "margin": "1"}, "wrong type"),
    ("preference", {**PAIR, "margin": True}, "wrong type"),
    ("preference", {**PAIR, "margin": -1}, "negative margin"),
    ("preference", {**PAIR, "prompt": [user("Hi"), assistant("Hello")]}, "role order"),
    (
        "preference",
        {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Ho"), assistant("b")]},
        "no shared prompt",
    ),
    (
        "preference",
        {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("a")]},
        "same answers",
    ),
    (
        "preference",
        {"chosen": [user("Hi"), assistant("a"), user("b"), assistant("c")], "rejected": [user("Hi")]},
        "empty",
    ),
    ("ranking", {"prompt": "Hi", "responses": "a"}, "wrong type"),
    ("ranking", {"prompt": "Hi", "responses": ["a"]}, "no pair"),
    ("ranking", {"prompt": "Hi", "responses": ["a", "a"]}, "same answers"),
    ("ranking", {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 1]}, "no pair"),
    ("ranking", {"prompt": "Hi", "responses": ["a", "b"], "scores": [1]}, "wrong length"),
    ("ranking", {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, None]}, "wrong type"),
    ("unpaired", {"prompt": "Hi", "completion": "a", "label": 1}, "wrong type"),
    ("unpaired", {"prompt": "Hi", "completion": "a"}, "missing field"),
    ("unpaired", {"prompt": [user("Hi")], "completion": [user("Hi")], "label": True}, "no assistant turn"),
]


@pytest.mark.parametrize(("format", "row", "reason"), MALFORMED)
def test_malformed_rows_are_refused_for_their_reason(format, row, reason):
    parse = parse_comparison if format in preferences.COMPARISONS else parse_labelled
    with pytest.raises(RowError) as caught:
        parse(row, format)
    assert caught.value.reason == reason


def test_labelled_answers_keep_their_label(tokenizer, tmp_path, write):
    rows = [
        {"prompt": "Hi", "completion": " you", "label": True},
        {"prompt": [user("Hi")], "completion": [assistant("Hello")], "label": False},
    ]
    [table] = answers.prepare_labelled(
        [Source(write("liked.jsonl", rows))],
        tokenizer=tokenizer,
        max_length=64,
        cache_dir=tmp_path / "cache",
    )
    assert table.format == "unpaired"
    assert [table.judged(row).desirable for row in range(2)] == [True, False]
    assert shown(tokenizer, table, 0) == ["Hi", "⟦ you<|im_end|>⟧"]
    assert shown(tokenizer, table, 1) == [CHAT, "⟦Hello<|im_end|>⟧"]


def test_truncation_leaves_something_of_prompt_and_answers(tokenizer, tmp_path, write):
    """Prompt of 3 words, answers of 6 and 2, one token a word, and an end: 3 + 7 of at most 8."""
    words = ["yes"] * 3, [" one"] * 6, [" two"] * 2
    one = len(tokenizer(" one")["input_ids"])
    row = dict(zip(("prompt", "chosen", "rejected"), map("".join, words), strict=True))
    whole = compared(tokenizer, tmp_path, write, [row]).judged(0)
    p, a, b = len(whole.prompt), len(whole.ids[0]), len(whole.ids[1])
    assert a == 6 * one + 1
    most = p + a - 2
    for refused in ("error", "drop"):
        with pytest.raises(DataError, match=f"{p} tokens of prompt and {a} of the longest answer"):
            compared(tokenizer, tmp_path, write, [row], max_length=most, truncation=refused)
    table = compared(
        tokenizer, tmp_path, write, [row, {**row, "chosen": " a"}], max_length=most, truncation="drop"
    )
    assert (len(table), table.counts.dropped) == (1, {"over-long": 1})
    right = compared(tokenizer, tmp_path, write, [row], max_length=most, truncation="right")
    assert right.judged(0).prompt.tolist() == whole.prompt.tolist()
    assert right.judged(0).ids[0].tolist() == whole.ids[0][:-2].tolist()
    assert right.judged(0).ids[1].tolist() == whole.ids[1].tolist()
    assert right.counts.truncated == 1
    left = compared(tokenizer, tmp_path, write, [row], max_length=most, truncation="left")
    assert left.judged(0).prompt.tolist() == whole.prompt[2:].tolist()
    assert [len(ids) for ids in left.judged(0).ids] == [a, b]
    with pytest.raises(DataError, match=rf"pairs.jsonl:1: a prompt of {p} tokens alone fills"):
        compared(tokenizer, tmp_path, write, [row], max_length=p, truncation="right")
    with pytest.raises(DataError, match=rf"pairs.jsonl:1: an answer of {a} tokens alone fills"):
        compared(tokenizer, tmp_path, write, [row], max_length=a, truncation="left")


def test_formats_are_told_apart_by_what_is_wanted():
    """The fields of UltraFeedback speak of pairs and of conversations: it depends on who asks."""
    row = {"prompt": "a", "chosen": [], "rejected": [], "messages": [], "score_chosen": 1}
    assert detect([row], preferences.COMPARISONS) == "preference"
    assert detect([row], ["messages", "text"]) == "messages"
    assert detect([{"prompt": "a", "responses": []}], preferences.COMPARISONS) == "ranking"
    assert detect([{"prompt": "a", "completion": "b", "label": True}], FIELDS) == "unpaired"


REFUSED = [
    (
        {"question": "a", "accepted": "b", "bad": "c"},
        "Nearest is preference: call accepted chosen and bad rejected",
    ),
    ({"prompt": "a", "chosen_response": "b", "rejected_response": "c"}, "call chosen_response chosen"),
    ({"messages": []}, "These rows are of the format messages, for stage=sft"),
    (
        {"prompt": "a", "completion": "b", "label": True},
        "unpaired, for stage=preference with loss=kto",
    ),
    ({"a": 1}, "found fields a; expected chosen and rejected, or prompt and responses"),
]


@pytest.mark.parametrize(("row", "words"), REFUSED)
def test_rows_of_no_wanted_format_are_refused_by_line_with_what_comes_nearest(
    tokenizer, tmp_path, write, row, words
):
    with pytest.raises(DataError, match=words) as caught:
        compared(tokenizer, tmp_path, write, write("pairs.jsonl", [b"", row]))
    assert caught.value.line == 2


def test_a_named_format_must_be_of_use(tokenizer, tmp_path, write):
    path = write("pairs.jsonl", [PAIR])
    with pytest.raises(DataError, match=r"format=text is for stage=sft; expected rows with chosen and"):
        answers.prepare_comparisons(
            [Source(path, format="text")], tokenizer=tokenizer, max_length=9, cache_dir=tmp_path
        )


def test_tables_are_cached_and_settings_decide(tokenizer, tmp_path, write):
    rows = [PAIR, {"prompt": "Hi", "responses": [" x", " y", " z"]}]
    path = write("pairs.jsonl", [rows[0]])
    one, two = (compared(tokenizer, tmp_path, write, path) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert np.array_equal(one.example(0)[0], two.example(0)[0])
    other = compared(tokenizer, tmp_path, write, path, max_length=255)
    assert other.fingerprint != one.fingerprint
