"""W&B in processes of its own: what arrives, what is kept, what never leaves, and who waits for whom."""

import json
import time

import pytest
from wandb_process import CANARY, black_hole, history, inspect, leaks, run
from wandb_server import Server


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def test_records_arrive_with_their_steps(tmp_path, server):
    """Steps are a metric, defined as the axis of all others; nothing secret is in any request or file."""
    said = run(
        tmp_path / "run",
        """
        log(1, 2)
        found = {"task/loss": 0.5}
        tracker.log("eval", found, step=2)
        found.clear()  # the trainer's next look fills the same mapping
        tracker.log("event", {"message": "for people"}, step=2)
        rows = [{"prompt": "p", "before": "b"}, {"prompt": "q", "after": "a"}]
        tracker.log("samples", {"rows": rows}, step=2)
        log(3)
        tracker.artifact("checkpoints/step-000003", kind="checkpoint")
        done()
        """,
        url=server.url,
    )
    assert f"W&B: {server.url}" in said
    rows = [server.history[i] for i in sorted(server.history)]
    assert [row["step"] for row in rows] == [1, 2, 2, 2, 3]
    assert [row.get("loss/train") for row in rows] == [0.5, 1.0, None, None, 1.5]
    assert rows[2]["held-out/task/loss"] == 0.5
    assert rows[3]["samples"]["nrows"] == 2
    table = next(body for path, body in server.requests if path.endswith(".table.json"))
    assert json.loads(table) == {
        "columns": ["prompt", "before", "after"],
        "data": [["p", "b", ""], ["q", "", "a"]],
    }
    config = json.loads(server.bucket["config"])
    assert config["optim"]["value"] == {"lr": 1e-5}
    axis = [metric.get("1") for metric in config["_wandb"]["value"]["m"]].index("step") + 1
    defined = {metric.get("1") or metric["2"]: metric for metric in config["_wandb"]["value"]["m"]}
    assert {defined[name]["5"] for name in ("samples", "loss/*", "held-out/*", "memory/*")} == {axis}
    summary = json.loads(server.runs[server.bucket["name"]]["summary"])
    assert summary["loss/train"] == {"min": 0.5, "last": 1.5}
    assert summary["held-out/task/loss"] == {"min": 0.5, "max": 0.5, "last": 0.5}
    assert summary["objective"] == 0.5  # what a sweep of W&B follows
    assert (server.bucket["groupName"], server.bucket["jobType"]) == ("sweep-1", "sft")
    assert (server.bucket["displayName"], server.bucket["tags"]) == ("first", ["tiny"])
    assert "program" not in server.bucket
    assert server.complete == [True]
    assert not [path for path, body in server.requests if CANARY in body]
    assert leaks(tmp_path) == []


def test_without_a_key_the_run_is_recorded_offline(tmp_path):
    """Read back with wandb's own tool: every record, in order, on the right step; no secret in a file."""
    said = run(
        tmp_path / "run",
        """
        log(1, 2)
        tracker.log("samples", {"rows": [{"prompt": "p", "after": "a"}]}, step=2)
        done()
        """,
        key=False,
    )
    assert "no key here" in said
    assert "wandb sync " + str(tmp_path / "run" / "wandb" / "offline-run-") in said
    rows = history(inspect(tmp_path / "run"))
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert [row.get("loss/train") for row in rows] == [0.5, 1, None]
    assert leaks(tmp_path) == []


def test_a_netrc_file_is_a_key(tmp_path, server):
    host = server.url.removeprefix("http://")
    (tmp_path / ".netrc").write_text(f"machine {host} login user password {'k' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    run(tmp_path / "run", "log(1); done()", url=server.url, key=False)
    assert [row["step"] for row in server.history.values()] == [1]


@pytest.mark.parametrize("where", ["refused", "black hole"])
def test_a_server_that_is_not_there_costs_no_time_and_no_record(tmp_path, where):
    """Logging never waits; closing at once waits less than the limit; all is in the offline files."""
    with black_hole() as hole:
        url = hole if where == "black hole" else "http://127.0.0.1:9"
        began = time.perf_counter()
        said = run(
            tmp_path / "run",
            """
            log(1, 2, 3)
            print("start took", time.perf_counter() - began)
            done()
            """,
            url=url,
            mode="online",
            timeout_s=8,
        )
        took = time.perf_counter() - began
    assert "W&B does not answer, so this run is recorded offline" in said
    assert float(said.split("start took ")[1].split()[0]) < 1
    assert float(said.split("close took ")[1].split()[0]) < 8.5
    assert took < 25
    assert [row["step"] for row in history(inspect(tmp_path / "run"))] == [1, 2, 3]


def test_a_server_that_goes_silent_costs_no_time(tmp_path, server):
    """After the first record it answers no more: the rest is logged at once, the end waits 3 s at most."""
    server.silent_after_history = True
    began = time.perf_counter()
    said = run(
        tmp_path / "run",
        """
        log(1)
        time.sleep(2.5)
        logged = time.perf_counter()
        log(*range(2, 200))
        tracker.log("samples", {"rows": [{"prompt": "p"}]}, step=199)
        log(200)
        print("logging took", time.perf_counter() - logged)
        done()
        """,
        url=server.url,
        timeout_s=3,
    )
    took = time.perf_counter() - began
    assert float(said.split("logging took ")[1].split()[0]) < 0.5
    assert float(said.split("close took ")[1].split()[0]) < 4
    assert took < 15


def test_a_broken_library_stops_nothing(tmp_path):
    said = run(
        tmp_path / "run",
        """
        import wandb
        tracker.close("done")
        def broken(*_, **__):
            raise RuntimeError("first line\\nsecond line")
        wandb.init = broken
        tracker = Wandb(Path("elsewhere"), project="p", config={}, mode="offline", say=print)
        log(1); tracker.artifact("x", kind="model"); tracker.close("failed")
        """,
        mode="offline",
    )
    assert "W&B records nothing in this run: first line\n" in said
