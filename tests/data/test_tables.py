"""Tables hold what was read, say what was left out, and are made once."""

import fcntl
import json
import multiprocessing
import os
import time

import numpy as np
import pytest

from framework.data import cache, tables, tokenise
from framework.data.sources import Source
from framework.errors import DataError


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows(n):
    return [talk(f"Question {i}?", "yes " * (1 + i % 5)) for i in range(n)]


def prepare(tokenizer, tmp_path, *paths, **settings):
    wanted = [path if isinstance(path, Source) else Source(path) for path in paths]
    settings = {"max_length": 256, "cache_dir": tmp_path / "cache", **settings}
    return tables.prepare(wanted, tokenizer=tokenizer, **settings)


def test_a_table_gives_each_example_its_tokens_mask_and_place(tokenizer, tmp_path, write):
    path = write("mine.jsonl", [*rows(2), b"", talk("Hi", "Hello")])
    [table] = prepare(tokenizer, tmp_path, path)
    assert (len(table), table.name, table.format) == (3, "mine", "messages")
    ids, trained = table.example(2)
    assert tokenizer.decode(ids.tolist()) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )
    assert tokenizer.decode(ids[trained].tolist()) == "Hello<|im_end|>"
    assert table.where(2) == f"{path}:4"
    for row in range(3):
        ids, trained = table.example(row)
        assert (table.lengths[row], table.trained[row]) == (len(ids), trained.sum())
    assert table.counts.tokens == table.lengths.sum()
    assert table.counts.trained_tokens == table.trained.sum()


BAD = [
    (talk("", "a"), "empty"),
    ({"messages": 3}, "wrong type"),
    ({"id": 3}, "missing field"),
    (b"{", "invalid JSON"),
    (b"\xff", "invalid UTF-8"),
    (b"3", "not an object"),
    (talk("Hi", "yes " * 300), "over-long"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_a_bad_row_is_refused_by_place_or_dropped_and_counted(tokenizer, tmp_path, write, bad, reason):
    path = write("mine.jsonl", [*rows(2), bad, *rows(1)])
    with pytest.raises(DataError, match=r"mine.jsonl:3: .*pass data.on_bad_row=drop") as caught:
        prepare(tokenizer, tmp_path, path)
    assert (caught.value.path, caught.value.line) == (path, 3)
    assert os.listdir(tmp_path / "cache") == []
    [table] = prepare(tokenizer, tmp_path, path, on_bad_row="drop")
    assert (table.counts.rows, table.counts.kept, table.counts.dropped) == (4, 3, {reason: 1})
    assert [table.where(row)[-1] for row in range(3)] == ["1", "2", "4"]


def test_truncation_drop_is_a_wish_and_not_a_bad_row(tokenizer, tmp_path, write):
    path = write("mine.jsonl", [*rows(2), talk("Hi", "yes " * 300)])
    [table] = prepare(tokenizer, tmp_path, path, truncation="drop")
    assert (table.counts.kept, table.counts.dropped) == (2, {"over-long": 1})
    [table] = prepare(tokenizer, tmp_path, path, truncation="right")
    assert (table.counts.kept, table.counts.truncated, table.lengths.max()) == (3, 1, 256)


def test_nothing_left_is_refused_whatever_the_policy(tokenizer, tmp_path, write):
    path = write("mine.jsonl", [talk("", "a"), talk("Hi", "yes " * 300), talk("", "b")])
    message = r"none of the 3 rows can be trained on \(empty: 2, over-long: 1\); the first is .*:1: "
    with pytest.raises(DataError, match=message):
        prepare(tokenizer, tmp_path, path, on_bad_row="drop")
    blank = write("blank.jsonl", [b"", b" "])
    with pytest.raises(DataError, match="there are no rows"):
        prepare(tokenizer, tmp_path, blank, on_bad_row="drop")


def test_formats_are_detected_from_the_first_rows_or_named(tokenizer, tmp_path, write):
    mixed = write("mixed.jsonl", [*rows(1), {"text": "a"}])
    with pytest.raises(DataError, match=r"messages \(row 1\) and text \(row 2\).*set format"):
        prepare(tokenizer, tmp_path, mixed, on_bad_row="drop")
    [table] = prepare(tokenizer, tmp_path, Source(mixed, format="messages"), on_bad_row="drop")
    assert table.counts.dropped == {"missing field": 1}
    unknown = write("unknown.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(
        DataError, match=r"found fields answer, question; expected messages, prompt and .*set format"
    ):
        prepare(tokenizer, tmp_path, unknown)
    with pytest.raises(DataError, match=r"broken.jsonl:1: not JSON"):
        prepare(tokenizer, tmp_path, write("broken.jsonl", [b"{"]))


def test_names_are_given_or_from_the_path_and_unique(tokenizer, tmp_path, write):
    path = write("mine.jsonl", rows(1))
    named = prepare(tokenizer, tmp_path, path, path, Source(path, name="general"))
    assert [table.name for table in named] == ["mine", "mine-2", "general"]


def test_workers_do_not_change_the_result(tokenizer, tmp_path, write, monkeypatch):
    """More rows than are tokenised before helpers start."""
    monkeypatch.setattr(tokenise, "INLINE_CHUNKS", 2)
    monkeypatch.setattr(tokenise, "CHUNK", 8)
    n = tokenise.CHUNK * 20 + 7
    path = write("mine.jsonl", [*rows(n), talk("", "bad")])
    [one] = prepare(tokenizer, tmp_path, path, on_bad_row="drop")
    [two] = prepare(tokenizer, tmp_path, path, on_bad_row="drop", workers=2, cache_dir=tmp_path / "other")
    assert (one.counts, one.fingerprint) == (two.counts, two.fingerprint)
    assert len(one) == n
    for name, values in one._arrays.items():
        assert np.array_equal(values, two._arrays[name])


def test_the_cache_is_used_again_and_depends_on_everything_that_decides(
    tokenizer, bos_tokenizer, tmp_path, write, monkeypatch
):
    path = write("mine.jsonl", rows(3))
    [first] = prepare(tokenizer, tmp_path, path)
    built = []
    build = tokenise._build
    monkeypatch.setattr(tokenise, "_build", lambda *args: built.append(1) or build(*args))
    tokenizer("used with other settings in between", truncation=True, max_length=4)
    [again] = prepare(tokenizer, tmp_path, path, workers=2)
    assert built == []
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.example(1)[0], first.example(1)[0])
    others = [
        prepare(tokenizer, tmp_path, path, **changed)[0]
        for changed in (
            {"max_length": 255},
            {"truncation": "left"},
            {"train_on": "all"},
            {"on_bad_row": "drop"},
            {"vocab_size": 5000},
            {"chat_template": "chatml"},
        )
    ]
    others += prepare(bos_tokenizer, tmp_path, path, chat_template="plain")
    others += prepare(tokenizer, tmp_path, write("mine.jsonl", rows(4)))
    fingerprints = {table.fingerprint for table in [first, *others]}
    assert len(fingerprints) == len(others) + 1 == 9
    assert len(built) == len(others)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_cache_is_noticed_and_made_again(tokenizer, tmp_path, write, caplog, damage):
    path = write("mine.jsonl", rows(3))
    [first] = prepare(tokenizer, tmp_path, path)
    expected = first.example(1)[0].tolist()
    directory = tmp_path / "cache" / first.fingerprint
    tokens = directory / "tokens.bin"
    raw = bytearray(tokens.read_bytes())
    raw[5] ^= 1
    match damage:
        case "flip":
            tokens.write_bytes(raw)
        case "cut":
            tokens.write_bytes(raw[:-4])
        case "remove":
            tokens.unlink()
        case "manifest":
            (directory / cache.MANIFEST).write_text(json.dumps({"arrays": {}}))
    with pytest.raises(cache.Damaged):
        cache.open_arrays(directory)
    [again] = prepare(tokenizer, tmp_path, path)
    assert again.example(1)[0].tolist() == expected
    assert "damaged and is made again" in caplog.text


def test_what_a_killed_build_left_is_cleared(tokenizer, tmp_path, write):
    path = write("mine.jsonl", rows(3))
    [table] = prepare(tokenizer, tmp_path, path)
    left = tmp_path / "other" / f"{table.fingerprint}.building"
    left.mkdir(parents=True)
    (left / "tokens.bin").write_text("half")
    prepare(tokenizer, tmp_path, path, cache_dir=tmp_path / "other")
    assert os.listdir(tmp_path / "other") == [table.fingerprint]


def _slow_build(directory):
    with open(directory.parent / "builds", "a") as log:
        log.write("1")
    time.sleep(0.3)
    writer = cache.Writer(directory, {"a": "<i4"})
    writer.append("a", np.arange(5))
    writer.seal({})


def _get(root, answers):
    arrays, _ = cache.get_or_build(root, "key", _slow_build)
    answers.put(arrays["a"].tolist())


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_get, args=(tmp_path, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [answers.get() for _ in processes] == [[0, 1, 2, 3, 4]] * 3
    for process in processes:
        process.join()
    assert (tmp_path / "builds").read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == ["builds", "key"]


def test_a_lock_held_elsewhere_is_waited_for(tmp_path):
    held = os.open(tmp_path / "key.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=_get, args=(tmp_path, answers))
    process.start()
    process.join(0.3)
    assert process.is_alive()
    assert not (tmp_path / "builds").exists()
    fcntl.flock(held, fcntl.LOCK_UN)  # the child has a copy of the handle: closing ours is not enough
    os.close(held)
    process.join(10)
    assert answers.get() == [0, 1, 2, 3, 4]


def test_progress_is_told(tokenizer, tmp_path, write):
    told = []
    prepare(
        tokenizer,
        tmp_path,
        write("mine.jsonl", rows(300)),
        progress=lambda name, rows: told.append((name, rows)),
    )
    assert told == [("mine", tokenise.CHUNK), ("mine", 300)]
