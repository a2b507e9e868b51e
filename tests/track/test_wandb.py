"""W&B in processes of its own: what arrives, what is kept, what never leaves, and who waits for whom."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from wandb_server import Server

ROOT = Path(__file__).parents[2]
CANARY = "hunter2canary7f3a"
START = """
import sys, time
from framework.track.wandb import Wandb
began = time.perf_counter()
tracker = Wandb(
    {run_dir!r}, project="words", config={{"optim": {{"lr": 1e-5}}, "name": "first"}}, group="sweep-1",
    job_type="sft", name="first", tags=["tiny"], mode={mode!r}, timeout_s={timeout_s}, say=print,
)
def log(*steps):
    for step in steps:
        tracker.log("train", {{"loss": step / 2, "grad_norm": float("nan")}}, step=step)
def done():
    began = time.perf_counter()
    tracker.close("done")
    print("close took", time.perf_counter() - began)
"""


def run(run_dir, script, *, url=None, mode="auto", timeout_s=6, key=True, seconds=40):
    """The script, after START, in a new process with secrets around. -> what it printed"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(run_dir.parent), "SECRET_TOKEN": CANARY}
    environment |= {"WANDB_BASE_URL": url} if url else {}
    environment |= {"WANDB_API_KEY": CANARY.ljust(40, "0")} if key else {}
    start = START.format(run_dir=str(run_dir), mode=mode, timeout_s=timeout_s)
    answer = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(script), f"--token={CANARY}"],
        env=environment, cwd=run_dir.parent, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return answer.stdout + answer.stderr


def inspect(run_dir):
    """The records of the newest offline directory, read with wandb's own tool."""
    newest = max(run_dir.glob("wandb/*run-*"), key=lambda path: path.stat().st_mtime)
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", newest]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"HOME": run_dir}
    )
    return [json.loads(line) for line in answer.stdout.splitlines()]


def history(records):
    return [record["history"]["item"] for record in records if "history" in record]


def leaks(run_dir):
    return [path for path in run_dir.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@contextmanager
def black_hole():
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as hole:
        yield f"http://127.0.0.1:{hole.getsockname()[1]}"


def test_records_arrive_with_their_steps(tmp_path, server):
    """Steps are a metric, defined as the axis of all others; nothing secret is in any request or file."""
    said = run(
        tmp_path / "run",
        """
        log(1, 2)
        tracker.log("eval", {"task/loss": 0.5}, step=2)
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
    assert [row.get("train/loss") for row in rows] == [0.5, 1.0, None, None, 1.5]
    assert rows[2]["eval/task/loss"] == 0.5
    assert rows[3]["samples"]["nrows"] == 2
    table = next(body for path, body in server.requests if path.endswith(".table.json"))
    assert json.loads(table) == {
        "columns": ["prompt", "before", "after"],
        "data": [["p", "b", ""], ["q", "", "a"]],
    }
    config = json.loads(server.bucket["config"])
    assert config["optim"]["value"] == {"lr": 1e-5}
    everything, axis = config["_wandb"]["value"]["m"]
    assert (everything["2"], everything["5"], axis["1"]) == (
        "*",
        2,
        "step",
    )  # "*" is drawn over number 2: "step"
    assert (server.bucket["groupName"], server.bucket["jobType"]) == ("sweep-1", "sft")
    assert (server.bucket["displayName"], server.bucket["tags"]) == ("first", ["tiny"])
    assert "program" not in server.bucket
    assert server.complete == [True]
    assert not [path for path, body in server.requests if CANARY in body]
    assert leaks(tmp_path) == []


def test_a_resumed_run_goes_on_on_its_page(tmp_path, server):
    """The service has steps 1..4; resumed from 2, the run repeats 3 and 4: only 5 is new to it."""
    first = run(tmp_path / "run", "log(1, 2, 3, 4); done()", url=server.url)
    name = server.bucket["name"]
    assert (tmp_path / "run" / "wandb" / "run_id").read_text() == name
    assert name in first
    server.known = {
        "historyLineCount": 4, "eventsLineCount": 0, "logLineCount": 0, "historyTail": '["{\\"_step\\": 3}"]',
        "summaryMetrics": '{"step": 4, "_step": 3}', "config": "{}", "eventsTail": "[]",
        "wandbConfig": '{"t": 1}', "tags": [],
    }  # fmt: skip
    server.history.clear()
    run(tmp_path / "run", "log(3, 4, 5); done()", url=server.url)
    assert server.bucket["name"] == name
    assert [row["step"] for row in server.history.values()] == [5]


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
    assert [row.get("train/loss") for row in rows] == [0.5, 1, None]
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
            timeout_s=4,
        )
        took = time.perf_counter() - began
    assert "W&B does not answer, so this run is recorded offline" in said
    assert float(said.split("start took ")[1].split()[0]) < 1
    assert float(said.split("close took ")[1].split()[0]) < 4.5
    assert took < 12
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
        tracker = Wandb(sys.argv[1], project="p", config={}, mode="offline", say=print)
        log(1); tracker.artifact("x", kind="model"); tracker.close("failed")
        """,
        mode="offline",
    )
    assert "W&B records nothing in this run: first line\n" in said
