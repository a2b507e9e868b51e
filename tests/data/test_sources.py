"""The same rows from every kind of file; places that editors can jump to; refusals that name the way out."""

import json

import pytest

from framework.data.records import RowError
from framework.data.sources import Source, locate
from framework.errors import DataError

ROWS = [{"text": "one"}, {"text": "two"}, {"text": "three"}]


def read(path, **settings):
    located = locate(Source(str(path), **settings))
    return [(located.where(p.file, p.line), p.value) for p in located.rows()]


def test_every_kind_of_file_gives_the_same_rows(tmp_path, write):
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset, DatasetDict

    lines = write("a.jsonl", ROWS)
    assert read(lines) == [(f"{lines}:{n}", row) for n, row in enumerate(ROWS, start=1)]
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps(ROWS, indent=2))
    assert read(listed) == [(f"{listed} row {n}", row) for n, row in enumerate(ROWS, start=1)]
    mislabelled = write("b.json", ROWS)  # lines in a .json file
    assert read(mislabelled)[2] == (f"{mislabelled}:3", ROWS[2])
    columns = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), columns)
    assert read(columns) == [(f"{columns} row {n}", row) for n, row in enumerate(ROWS, start=1)]
    saved = tmp_path / "saved"
    Dataset.from_list(ROWS).save_to_disk(str(saved))
    assert [row for _, row in read(saved)] == ROWS
    splits = tmp_path / "splits"
    DatasetDict({"test": Dataset.from_list(ROWS[:1]), "train": Dataset.from_list(ROWS)}).save_to_disk(
        str(splits)
    )
    assert [row for _, row in read(splits, split="test")] == ROWS[:1]
    with pytest.raises(DataError, match="no split 'dev'; it has"):
        read(splits, split="dev")


def test_several_files_by_pattern_or_directory_in_order_of_name(tmp_path, write):
    (tmp_path / "d").mkdir()
    second, first = write("d/b.jsonl", ROWS[1:]), write("d/a.jsonl", ROWS[:1])
    expected = [(f"{first}:1", ROWS[0]), (f"{second}:1", ROWS[1]), (f"{second}:2", ROWS[2])]
    assert read(tmp_path / "d") == expected
    assert read(tmp_path / "d" / "*.jsonl") == expected


def test_nulls_that_parquet_adds_to_structs_are_absent_keys(tmp_path):
    import pyarrow
    import pyarrow.parquet

    calls = [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {"y": 2}}]
    rows = [{"calls": [call]} for call in calls]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [row for _, row in read(path)] == rows


def test_unreadable_lines_keep_their_place_and_blank_ones_are_no_rows(write):
    lines = [
        b'\xef\xbb\xbf{"text": "a"}',
        b"",
        b"  ",
        b'{"text": "b"',
        b'{"text": "\xff"}',
        b'{"n": NaN}',
        b"3",
    ]
    lines += [b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"]
    rows = read(write("a.jsonl", lines))
    assert [int(place.rsplit(":")[-1]) for place, _ in rows] == [1, 4, 5, 6, 7, 8, 9]
    assert rows[0][1] == {"text": "a"}
    assert rows[4][1] == 3
    reasons = [value.reason for _, value in rows if isinstance(value, RowError)]
    assert reasons == ["invalid JSON", "invalid UTF-8", "invalid JSON", "invalid JSON", "invalid JSON"]


def test_missing_things_are_refused_with_the_nearest_name(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write("training.jsonl", ROWS)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "bad.json").write_text('[{"text": "a"},\n {]')
    (tmp_path / "bad.parquet").write_text("text")
    cases = [
        ("trainin.jsonl", "no such file; nearest is training.jsonl"),
        (f"{path}x.jsonl", "no such file; nearest is"),
        ("nowhere/a.jsonl", "no such file; . holds"),
        ("*.arrow", "no file matches"),
        ("empty.jsonl", "the file is empty"),
        ("bare", "no .jsonl, .ndjson, .json, .parquet file"),
        ("a.csv", "unknown kind of file"),
        ("bad.json", r"bad.json:2: not JSON at column 3"),
        ("bad.parquet", "not a readable Parquet file"),
        ("training", "nearest is training.jsonl; and no data set of this name could be loaded from the hub"),
        ("/dev/null", "not a regular file"),
    ]
    for given, message in cases:
        with pytest.raises(DataError, match=message):
            read(given)


def test_a_broken_line_says_where_in_the_line(tmp_path):
    """One that breaks off does so at its end, though the parser comes to the next line."""
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "a"}\n{"text": }\n{"text": \n')
    (_, good), (_, wrong), (_, short) = read(path)
    assert good == {"text": "a"}
    assert str(wrong).startswith("not JSON at column 10")
    assert str(short).startswith("not JSON at column 11")


def test_the_digest_is_of_content(tmp_path, write):
    one, same, other = write("a.jsonl", ROWS), write("b.jsonl", ROWS), write("c.jsonl", ROWS[::-1])
    digests = [locate(Source(path)).digest for path in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_scripts_beside_data_are_not_run(tmp_path, monkeypatch):
    """A directory with a loading script in the manner of old hubs is refused, and nothing in it runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text("open('ran', 'w')")
    for given in ("evil", "evil/evil.py", "./evil"):
        with pytest.raises(DataError):
            read(given)
    assert not (tmp_path / "ran").exists()
