"""The built-in probe: whole, varied, as its functions write it, apart from what the demonstration replays."""

import json
from pathlib import Path

import pytest

from framework.data import probing
from framework.data.leaks import normalised

ROOT = Path(__file__).resolve().parents[2]


def rows(source):
    return [json.loads(line) for line in Path(source.path).read_text(encoding="utf-8").splitlines()]


def text(row):
    return row.get("text") or " ".join(message["content"] for message in row["messages"])


@pytest.mark.parametrize("source", probing.built_in(), ids=probing.STRATA)
def test_every_stratum_has_its_rows_and_no_two_say_the_same(source):
    found = rows(source)
    assert len(found) == probing.ROWS
    assert len({normalised(text(row)) for row in found}) == probing.ROWS
    for row in found:
        assert 8 <= len(text(row)) <= 900
        if "messages" in row:
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_generated_rows_are_those_of_the_files():
    by_name = {source.name: rows(source) for source in probing.built_in()}
    assert by_name["arithmetic"] == probing.arithmetic()
    assert by_name["code"][-probing.GENERATED :] == probing.functions()


def test_generated_code_is_right():
    """Each ends with an assertion about itself, which Python runs here."""
    for row in probing.functions():
        exec(compile(row["text"], "probe", "exec"), {})


def test_generated_sums_are_right():
    for row in probing.arithmetic():
        answer = row["messages"][-1]["content"]
        if " = " in answer and answer.count("=") == 1:
            left, right = answer.removesuffix(".").split(" = ")
            if left.replace("+", "").replace("-", "").replace(" ", "").isdigit():
                assert sum_of(left) == int(right)


def sum_of(text):
    left, sign, right = text.split()
    return int(left) + (int(right) if sign == "+" else -int(right))


def test_the_demonstration_replays_none_of_it():
    probe = {normalised(text(row)) for source in probing.built_in() for row in rows(source)}
    for name in ("replay", "general"):
        lines = (ROOT / f"launch/demo_data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert not probe & {normalised(text(json.loads(line))) for line in lines}
