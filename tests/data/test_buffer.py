"""A buffer by itself: which rows are kept and drawn, that nothing of it is read unless it is whole."""

from dataclasses import replace

import numpy as np
import pytest

from framework.data import buffer
from framework.data.buffer import Buffer, Stratum
from framework.errors import DataError


def line(name, tokens=10):
    row = {"prompt": f"{name}?", "completion": name}
    return {**row, "row": buffer.row_hash(row), "from": f"{name}.jsonl:1", "tokens": tokens}


def stratum(name, rows, **changes):
    made = Stratum(name, "sft", f"/data/{name}.jsonl", "0" * 32, "CC0", "2030-01-01T00:00:00Z",
                   **buffer.measures(rows))  # fmt: skip
    return replace(made, **changes)


def test_a_rows_place_depends_on_seed_stratum_and_row_alone():
    """A row more at the end of the file moves no other: the places of the rest are in the same order."""
    before, after = buffer.order(3, "task", 500), buffer.order(3, "task", 501)
    assert after[after < 500].tolist() == before.tolist()
    assert sorted(before.tolist()) == list(range(500))
    for seed, name in ((4, "task"), (3, "other")):
        assert buffer.order(seed, name, 500).tolist() != before.tolist()


def test_every_row_is_kept_equally_often():
    """3 of 12 rows in 4,000 strata: 1,000 times each, standard deviation sqrt(4000 / 4 * 3 / 4) = 27."""
    counts = np.zeros(12)
    for number in range(4000):
        counts[buffer.order(0, f"stratum {number}", 12)[:3]] += 1
    assert counts.sum() == 12_000
    assert np.abs(counts - 1000).max() < 5 * 27


def test_what_surprises_most_comes_first_but_for_what_is_likely_damaged():
    """Of 250 rows the two that are least likely are the last; what differs by rounding keeps its order."""
    nats = [2.0] * 250
    nats[7], nats[100], nats[3], nats[200], nats[50] = 9.0, 8.0, 5.0, 4.0, -np.inf
    nats[1] = 2.0 + 1e-6
    order = buffer.surprising(nats)
    assert sorted(order) == list(range(250))
    assert order[:4] == [3, 200, 0, 1]
    assert order[-3:] == [50, 7, 100]
    assert buffer.surprising(nats[:99])[:2] == [7, 3]  # of fewer than a hundred none is taken for damaged
    assert buffer.surprising([]) == []


def test_rows_are_drawn_up_to_the_budget_and_the_next_moves_up_for_one_that_is_excluded():
    """Of 10, 30, 20, 5 and 5 tokens: 60 holds three and not four; without the second, 20, 5 and 5 come in."""
    rows = [line("a", 10), line("b", 30), line("c", 20), line("d", 5), line("e", 5)]

    def drawn(tokens, *names):
        excluded = {row["row"] for row in rows if row["completion"] in names}
        return [row["completion"] for row in buffer.draw(rows, tokens=tokens, excluded=excluded)]

    assert drawn(60) == ["a", "b", "c"]
    assert drawn(64) == ["a", "b", "c"]
    assert drawn(65) == ["a", "b", "c", "d"]
    assert drawn(60, "b") == ["a", "c", "d", "e"]
    assert drawn(9) == []


def test_a_rows_hash_is_of_what_is_imitated():
    one = line("a")
    assert buffer.row_hash(one) == one["row"]
    assert buffer.row_hash({**one, "from": "elsewhere.jsonl:7", "tokens": 3}) == one["row"]
    assert buffer.row_hash({**one, "completion": "b"}) != one["row"]


def test_its_identity_is_its_content_and_its_growth():
    whole = Buffer((stratum("a", [line("a")]),), ("x",), "parent")
    (first,) = whole.strata
    later = replace(first, added="2031-01-01T00:00:00Z", path="/moved/a.jsonl")
    assert replace(whole, strata=(later,)).identity == whole.identity
    for changed in (
        replace(whole, strata=(replace(first, shard="1" * 32),)),
        replace(whole, excluded=("x", "y")),
        replace(whole, parent=None),
    ):
        assert changed.identity != whole.identity


@pytest.fixture
def written(tmp_path):
    rows = [line("ä"), line("b")]
    whole = Buffer((stratum("letters", rows),), (), None)
    (tmp_path / f"{whole.strata[0].shard}.jsonl").write_bytes(buffer.encoded(rows))
    (tmp_path / buffer.MANIFEST).write_bytes(whole.encode())
    return tmp_path, whole, rows


def test_what_was_written_is_read_back(written):
    place, whole, rows = written
    assert buffer.read(place) == whole
    assert buffer.lines(place, whole.strata[0]) == rows
    assert (whole.strata[0].rows, whole.strata[0].tokens, whole.strata[0].format) == (
        2,
        20,
        "prompt_completion",
    )


def test_any_damage_is_refused(written):
    """A bit turned in any place of the manifest or of a shard; a shard that is gone."""
    place, whole, _ = written
    for path in (place / buffer.MANIFEST, place / f"{whole.strata[0].shard}.jsonl"):
        sound = path.read_bytes()
        for at in range(len(sound.rstrip())):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 2]) + sound[at + 1 :])
            if path.name == buffer.MANIFEST and sound[at : at + 1].isspace():
                continue  # between words of JSON
            with pytest.raises(DataError, match="remove the directory to go on without"):
                buffer.read(place)
        path.write_bytes(sound)
    path.unlink()
    with pytest.raises(DataError):
        buffer.read(place)


def test_a_manifest_names_no_file_outside():
    outside = Buffer((stratum("a", [line("a")], shard="../../secret"),)).encode()
    with pytest.raises(ValueError, match="which is no hash"):
        Buffer.decode(outside)
