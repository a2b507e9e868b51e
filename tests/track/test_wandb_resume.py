"""W&B through kills, outages and changes of mind: the page holds what metrics.jsonl holds, once."""

import json

import pytest
from wandb_process import history, inspect, run, sync
from wandb_server import Server

from framework.track import jsonl, panels

EVERY = """
def both(*steps):
    for step in steps:
        tracker.log("rollout", {"reward": step / 4, "kl": 0.1}, step=step - 1)
        log(step)
        if step % 2 == 0:
            tracker.log("eval", {"task/loss": 1 / step}, step=step)
"""


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def expected(run_dir):
    """What metrics.jsonl says, as the page calls it; NaN is a word in both."""
    rows = []
    for record in jsonl.read(run_dir / "metrics.jsonl"):
        kind, step = record.pop("kind"), record.pop("step")
        if kind != "event":
            rows.append(panels.placed(kind, jsonl.numbers(record)) | {"step": step})
            if kind == "eval":
                rows[-1]["objective"] = record["task/loss"]
    return [plain(row) for row in rows]


def plain(row):
    return {key: str(float(value)) for key, value in row.items() if not key.startswith("_")}


def shown(rows):
    return [plain(row) for row in rows]


def in_order(rows):
    return sorted(shown(rows), key=lambda row: json.dumps(row, sort_keys=True))


def test_a_killed_run_goes_on_without_a_gap_or_a_double_step(tmp_path, server):
    """Killed after step 5 with a checkpoint of step 4, then after 7 with one of 6: repeated records are not
    sent again, and the page ends as metrics.jsonl does, rollouts and evaluations too."""
    place = tmp_path / "run"
    run(place, EVERY + "both(1, 2, 3, 4, 5); killed(12, arrived=12)", url=server.url, status=-9)
    assert len(server.rows) == 12  # five steps of two lines, two evaluations
    run(place, EVERY + "both(5, 6, 7); killed(17, arrived=17)", url=server.url, status=-9, resume_step=4)
    run(place, EVERY + "both(7, 8); done()", url=server.url, resume_step=6)
    assert shown(server.rows) == expected(place)
    assert [row["_step"] for row in server.rows] == list(range(len(server.rows)))
    assert len(server.runs) == 1


def test_what_a_killed_run_could_not_send_is_sent_by_the_next(tmp_path, server):
    """The service takes nothing while six steps are taken; the run is killed, with a checkpoint of the fifth.
    What the page lacks comes from metrics.jsonl, in its order."""
    place = tmp_path / "run"

    def away(path):
        return 503 if path.endswith("file_stream") else None

    server.refuse = away
    run(place, EVERY + "both(1, 2, 3, 4, 5, 6); killed(15)", url=server.url, status=-9)
    assert server.rows == []
    server.refuse = lambda path: None
    run(place, EVERY + "both(6, 7); done()", url=server.url, resume_step=5)
    run(place, EVERY + "both(7); done()", url=server.url, resume_step=6)
    assert shown(server.rows) == expected(place)


def test_an_offline_run_is_one_whole_directory_after_any_number_of_kills(tmp_path, server):
    place = tmp_path / "run"
    run(place, EVERY + "both(1, 2, 3); killed(7)", key=False, status=-9)
    run(place, EVERY + "both(3, 4); done()", key=False, resume_step=2)
    (only,) = place.glob("wandb/offline-run-*")
    assert shown(history(inspect(place))) == expected(place)
    sync(server, tmp_path, only)
    assert shown(server.rows) == expected(place)
    assert server.complete == [True]


def test_a_run_sent_by_hand_goes_on_offline_with_what_is_new(tmp_path, server):
    """Offline to step 2, sent; offline from a checkpoint of step 1: only what the page lacks is recorded, and
    the second `wandb sync` puts it behind the first."""
    place = tmp_path / "run"
    run(place, EVERY + "both(1, 2); done()", key=False)
    (first,) = place.glob("wandb/offline-run-*")
    sync(server, tmp_path, first)
    run(place, EVERY + "both(2, 3); done()", key=False, resume_step=1)
    (second,) = set(place.glob("wandb/offline-run-*")) - {first}
    sync(server, tmp_path, second)
    assert shown(server.rows) == expected(place)


def test_a_run_that_was_offline_is_sent_whole_once_the_service_answers(tmp_path, server):
    place = tmp_path / "run"
    run(place, EVERY + "both(1, 2, 3, 4); done()", key=False)
    run(place, EVERY + "both(3, 4, 5); done()", url=server.url, resume_step=2)
    assert not list(place.glob("wandb/offline-run-*"))  # it would show everything twice
    assert shown(server.rows) == expected(place)


def test_checkpoints_are_references_on_request(tmp_path, server):
    script = """
    log(1)
    Path("checkpoints/step-000001").mkdir(parents=True, exist_ok=True)
    Path("checkpoints/step-000001/manifest.json").write_text("{}")
    tracker.artifact(Path("checkpoints/step-000001"), kind="checkpoint")
    done()
    """
    run(tmp_path / "run", script, key=False, checkpoints=True)
    (found,) = [record["artifact"] for record in inspect(tmp_path / "run") if "artifact" in record]
    assert found["type"] == "checkpoint"
    assert "step-000001" in found["aliases"]
    entry = json.dumps(found["manifest"])
    assert f"file://{tmp_path}/checkpoints/step-000001" in entry
    run(tmp_path / "other", script, key=False)
    assert not [record for record in inspect(tmp_path / "other") if "artifact" in record]


def test_under_an_agent_the_run_is_the_sweeps(tmp_path, server):
    """`wandb agent` names the run, and says which project; a resumed run keeps that name."""
    given = {"WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "givenid1", "WANDB_PROJECT": "theirs"}
    run(tmp_path / "run", "log(1); done()", url=server.url, variables=given)
    assert set(server.runs) == {"givenid1"}
    first = next(json.loads(body) for _, body in server.requests if "upsertBucket" in body)["variables"]
    assert first["project"] == "theirs"
    assert server.bucket["sweep"] == "sw1"
    run(tmp_path / "run", "log(2); done()", url=server.url, resume_step=1)
    assert set(server.runs) == {"givenid1"}
