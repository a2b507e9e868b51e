"""The whole of it, in small: a model learns three skills and facts, then a cipher, and what is left of them.

One start and four arms of some seconds each. What an arm keeps is measured by answers, not by the loss that
the controller steers by.
"""

import json

import characters
import pytest
from characters import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(directory, files, the model that has learnt skills and facts)."""
    place = tmp_path_factory.mktemp("characters")
    files = characters.write_data(place)
    characters.write_model(place / "untrained")
    train(place, "start", f"model.path={place}/untrained", f"data.train=[{{path: {files['learn']}}}]",
          "steps=600", "optim.lr=3e-3")  # fmt: skip
    return place, files


def arm(world, name, *overrides, watched=("skills",)):
    """(accuracy by set, result) after the cipher was learnt."""
    place, files = world
    sources = ",".join(f"{{path: {files[kind]}, name: {kind}}}" for kind in watched)
    result = train(
        place,
        name,
        f"model.path={place}/start/model",
        f"data.train=[{{path: {files['cipher']}}}]",
        f"evaluate.retention=[{sources}]",
        "steps=200",
        "optim.lr=1e-3",
        *[text.replace("REPLAY", str(files["replay"])) for text in overrides],
    )
    model = place / name / "model"
    return {kind: characters.accuracy(model, files[kind]) for kind in ("skills", "facts", "held")}, result


BUDGET = ("replay=budget", "replay.sources=[{path: REPLAY}]")


def test_the_start_has_learnt_what_can_be_forgotten(world):
    place, files = world
    for kind in ("skills", "facts"):
        assert characters.accuracy(place / "start/model", files[kind]) > 0.97
    assert characters.accuracy(place / "start/model", files["held"]) < 0.1


def test_without_replay_nothing_is_left_and_the_run_says_so(world):
    kept, result = arm(world, "none", watched=("skills", "facts"))
    assert kept == {"skills": 0.0, "facts": 0.0, "held": pytest.approx(1.0, abs=0.01)}
    assert result["retention"]["skills"]["low"] > 2.0  # nats a token
    assert result["retention"]["facts"]["low"] > 2.0


@pytest.fixture(scope="module")
def fixed(world):
    """A tenth of the trained tokens replayed throughout."""
    source = "replay.sources=[{path: REPLAY}]"
    return arm(world, "fixed", "replay=fixed", source, "replay.fraction=0.1", "retain.rows=120")


@pytest.fixture(scope="module")
def held(world):
    """Ten percent of perplexity on the skills, held by the controller."""
    return arm(world, "held", *BUDGET, "replay.max_forgetting=0.1")


def test_a_tenth_of_replay_keeps_the_skills(fixed):
    kept, result = fixed
    assert kept["skills"] > 0.75
    assert kept["held"] >= 0.99
    # the least of the controller's budgets below
    assert result["retention"]["skills"]["relative_high"] < 0.05


def test_the_controller_keeps_the_same_budget_with_less_replay(held, fixed):
    kept, result = held
    assert result["budget"]["verdict"] == "kept"
    assert 0.04 < result["retention"]["skills"]["relative_high"] <= 0.1  # used, not undercut by far
    assert result["budget"]["mean_replay"] < 0.06  # the fixed share above is 0.1
    assert kept["skills"] > 0.75
    assert kept["held"] >= 0.99


def test_the_share_that_was_asked_for_is_the_share_that_was_replayed(world, held):
    """By the tokens of every step against the shares that stand in the last checkpoint: to one example."""
    place, _ = world
    lines = [json.loads(line) for line in (place / "held/metrics.jsonl").read_text().splitlines()]
    shares = {line["step"]: line["replay/share"] for line in lines if line["kind"] == "retain"}
    owed, share = 0.0, 0.1
    looks = sorted(shares)
    for line in (line for line in lines if line["kind"] == "train"):
        # the share of a look is the one before it moved: of the steps that led there
        share = next((shares[look] for look in looks if look >= line["step"]), share)
        owed += share * line["trained_tokens"] - line["trained_tokens/replay"]
        assert abs(owed) <= 6  # an answer has five tokens at most
    moves = [line for line in lines if line["kind"] == "event" and "the replay share goes" in line["message"]]
    assert len(moves) > 10
    assert sum("up" in move["message"] for move in moves) >= 1


def test_five_budgets_are_kept_and_used_up_where_the_end_may_go_back(world):
    """Within a fifth of what was asked, the upper bound inside: more is forgotten while training, and given
    back. By many rows, the more the smaller the budget: the bound of few is far above what was measured."""
    used = {}
    for budget in (0.05, 0.1, 0.2, 0.3, 0.5):
        asked = ["protect=interpolate", f"replay.max_forgetting={budget}"]
        asked += [f"retain.rows={3000 if budget < 0.2 else 1000}", "retain.every=5"]
        kept, result = arm(world, f"back-{budget}", *BUDGET, *asked, watched=("many",))
        assert result["budget"]["verdict"] in ("kept", "kept by interpolation")
        found = result["retention"]["many"]  # of what was handed out
        assert found["relative"] < found["relative_high"] <= budget
        used[budget] = found["relative"] / budget
        assert kept["held"] >= 0.99
        assert result["budget"]["mean_replay"] < 0.06  # the fixed share, which keeps all five, is 0.1
    assert min(used.values()) >= 0.8, str(used)


def test_facts_that_cannot_be_replayed_make_the_budget_infeasible(world):
    kept, result = arm(
        world, "infeasible", *BUDGET, "replay.max_forgetting=0.05", watched=("skills", "facts")
    )
    assert result["budget"]["verdict"] == "infeasible"
    assert result["budget"]["binding"] == "facts"
    assert "facts has forgotten up to" in result["budget"]["message"]
    lines = (world[0] / "infeasible/metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines if "cannot be met" in line]
    assert len(told) == 1
    assert told[0]["step"] < 150  # while there is time to do something
    assert kept["held"] >= 0.99


def test_without_replay_a_budget_is_kept_by_going_back_and_the_way_is_shown(world):
    """Between start and end there is some of the cipher and much of the skills: the budget decides."""
    place, files = world
    asked = ["protect=interpolate", "replay.max_forgetting=0.2", "tracker.report=true"]
    asked += [f"data.eval=[{{path: {files['held']}, name: task}}]"]
    kept, result = arm(world, "interpolated", *asked)
    assert result["budget"]["verdict"] == "kept by interpolation"
    x = result["interpolation"]["x"]
    assert f"kept by interpolating with the start weights by {x:.4g}" in result["budget"]["message"]
    assert 0.2 < x < 0.7
    assert result["retention"]["skills"]["relative_high"] <= 0.2  # of what was handed out
    assert kept["skills"] > 0.75
    curve = {point["x"]: point for point in result["interpolation"]["curve"]}
    assert curve[0.0]["skills/change"] == 0.0
    assert curve[1.0]["skills/low"] > 2.0
    assert curve[1.0]["task/loss"] < 0.1 < result["metrics"]["task/loss"] < curve[0.0]["task/loss"]
    lines = [json.loads(line) for line in (place / "interpolated/metrics.jsonl").read_text().splitlines()]
    assert {line["x"] for line in lines if line["kind"] == "interpolate"} == set(curve)
    assert "Forgotten on the way back" in (place / "interpolated/report.html").read_text()
    assert (place / "interpolated/checkpoints/step-000200").is_dir()  # the tuned weights
    again, repeated = arm(world, "interpolated", *asked)  # from the checkpoint, which nothing has changed
    assert (again, repeated["interpolation"]) == (kept, result["interpolation"])
