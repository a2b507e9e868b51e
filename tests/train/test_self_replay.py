"""Replay without any old data, in small: what a model writes by itself keeps what it can do.

The start has learnt skills and facts as whole texts, as pretraining does; then comes the cipher. Nothing but
the start model's own text is replayed, and nobody tells it what to write about.
"""

import json

import characters
import pytest
from characters import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(directory, files, result of training): a model that begins, writes and ends rows of its own."""
    place = tmp_path_factory.mktemp("self")
    files = characters.write_data(place)
    characters.write_model(place / "untrained", begins=True)
    learn = f"data.train=[{{path: {files['learn']}}}]"
    train(
        place,
        "start",
        f"model.path={place}/untrained",
        learn,
        "data.train_on=all",
        "steps=900",
        "optim.lr=3e-3",
    )
    return place, files


def arm(world, name, *overrides):
    """Accuracy by set after the cipher was learnt."""
    place, files = world
    cipher = f"data.train=[{{path: {files['cipher']}}}]"
    train(place, name, f"model.path={place}/start/model", cipher, "steps=200", "optim.lr=1e-3", *overrides)
    kinds = ("skills", "facts", "held")
    return {kind: characters.accuracy(place / name / "model", files[kind]) for kind in kinds}


SELF = ("replay=synthesised", "replay.fraction=0.3", "synthesis.rows=1000", "synthesis.max_new_tokens=16")


def test_what_the_start_model_writes_keeps_its_skills_and_facts(world):
    """Facts, too, of which the real replay of the other arms has half: the model writes all that it knows."""
    place, files = world
    start = {kind: characters.accuracy(place / "start/model", files[kind]) for kind in ("skills", "facts")}
    assert min(start.values()) > 0.97
    kept = arm(world, "self", *SELF)
    assert kept["skills"] > 0.9
    assert kept["facts"] > 0.8
    assert kept["held"] >= 0.99
    (written,) = (place / "cache/synthesised").glob("self-*.jsonl")
    rows = [json.loads(line)["text"] for line in written.read_text().splitlines()]
    assert len(rows) == len(set(rows)) == 1000
    assert {row[0] for row in rows} >= set("CRSF")


def test_without_it_nothing_is_left(world):
    kept = arm(world, "none")
    assert kept["skills"] < 0.05
    assert kept["facts"] < 0.05
