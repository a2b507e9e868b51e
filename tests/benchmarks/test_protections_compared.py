"""The comparison of protections on a real model: its two tasks, and what it makes of its numbers."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from worlds import picture, smollm, texts  # noqa: E402

from framework.config.compose import compose  # noqa: E402
from framework.rollout import rewards  # noqa: E402


def test_no_value_and_no_phrasing_is_trained_on_and_held_out():
    for name in texts.VALUES[texts.TRAINED]:
        assert not set(texts.VALUES[texts.TRAINED][name]) & set(texts.VALUES[texts.HELD][name]), name
    for _, trained, held in texts.ROUTES.values():
        assert not set(trained) & set(held)


@pytest.mark.parametrize("task", texts.ASKED)
def test_held_out_questions_differ_from_those_trained_on_and_from_one_another(task, tmp_path):
    files = texts.write(tmp_path, 0, trained=smollm.TRAINED_ROWS, held=smollm.HELD_ROWS)
    trained, held = (
        [json.loads(line) for line in files[name].read_text().splitlines()] for name in (task, f"{task}-held")
    )
    asked = [row["messages"][0]["content"] for row in (*trained, *held)]
    assert len(set(asked)) == len(asked) == smollm.TRAINED_ROWS + smollm.HELD_ROWS
    again = texts.rows(task, texts.TRAINED, smollm.TRAINED_ROWS, 0)
    assert again == trained  # the same on every machine
    other = texts.rows(task, texts.HELD, smollm.HELD_ROWS, 1)
    assert other != held


def test_a_record_has_the_invented_format_and_says_what_the_sentence_says():
    for row in texts.rows("records", texts.TRAINED, 50, 0):
        said = re.fullmatch(r"\[vex (\w+); orb (\w+); kip (\w+); lun (\d+)\]", row["answer"])
        assert said is not None, row["answer"]
        assert all(value in row["messages"][0]["content"] for value in said.groups())
        assert rewards.exact(f" {row['answer']}\n", row) == 1
        assert rewards.exact(row["answer"][:-1], row) == 0


def test_every_kind_of_ticket_has_a_code_of_its_own_and_all_are_asked():
    codes = {code for code, _, _ in texts.ROUTES.values()}
    assert len(codes) == len(texts.ROUTES)
    for part in (texts.TRAINED, texts.HELD):
        assert {row["answer"] for row in texts.rows("tickets", part, smollm.HELD_ROWS, 0)} == codes


@pytest.mark.parametrize("arm", smollm.ARMS)
def test_the_settings_of_every_arm_are_accepted(arm, tmp_path):
    world = smollm.World(tmp_path, 0)
    run = compose(world.settings(arm, "model", "tickets", *smollm.LEARN_TICKETS, *smollm.ARMS[arm]))
    assert [source.name for source in run.evaluate.prompts] == list(texts.ASKED)


def test_an_arm_is_compared_with_no_protection_of_its_own_seed():
    """none loses records 1.0 to 0.2 and 0.5 nats of chat; an arm keeps 0.6 of them and 0.1 nats is lost."""
    start = {"arm": "start", "tickets": 0.0, "records": 1.0, "chat_change": 0.0, "chat_kl": 0.0}
    none = {"arm": "none", "tickets": 0.9, "records": 0.2, "chat_change": 0.5, "chat_kl": 0.4}
    other = {"arm": "both-50", "tickets": 0.45, "records": 0.6, "chat_change": 0.1, "chat_kl": 0.1}
    tokens = {"start": None, "none": 1000, "both-50": 1050}
    runs = [{**run, "seed": 3, "tokens": tokens[run["arm"]]} for run in (start, none, other)]
    found = smollm.derived(runs)[-1]
    expected = {"gain": 0.5, "records_kept": 0.5, "chat_kept": 0.8, "kl_kept": 0.75, "more_tokens": 0.05}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "gain" not in smollm.derived(runs[2:])[0]  # with nothing to compare with


def test_only_arms_that_none_beats_are_joined():
    points = [(0.0, 1.0), (0.5, 1.0), (0.9, 0.8), (0.8, 0.8), (0.4, 0.2)]
    assert picture.front(points) == [(0.5, 1.0), (0.9, 0.8)]
