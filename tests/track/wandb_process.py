"""Processes that record at W&B with secrets around, and what they have left."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
CANARY = "hunter2canary7f3a"
START = """
import json, os, signal, sys, time
from urllib.request import urlopen
from pathlib import Path
from framework.track.fanout import Fanout
from framework.track.jsonl import Jsonl
from framework.track.wandb import Wandb
began = time.perf_counter()
tracker = Fanout([
    Jsonl(Path({run_dir!r}) / "metrics.jsonl", resume_step={resume_step!r}),
    Wandb(
        Path({run_dir!r}), project="words", config={{"optim": {{"lr": 1e-5}}, "name": "first"}},
        group="sweep-1", job_type="sft", name="first", tags=["tiny"], mode={mode!r},
        timeout_s={timeout_s}, objective="task/loss", checkpoints={checkpoints}, say=print,
    ),
])
def log(*steps):
    for step in steps:
        tracker.log("train", {{"loss": step / 2, "grad_norm": float("nan")}}, step=step)
def killed(handed, *, arrived=0):
    # once the library was handed so many rows in all, and so many have arrived
    rows = Path({run_dir!r}, "wandb", "rows")
    while not rows.exists() or sum(">" not in row for row in rows.read_text().splitlines()) < handed:
        time.sleep(0.05)
    while arrived and json.load(urlopen(os.environ["WANDB_BASE_URL"] + "/count"))["rows"] < arrived:
        time.sleep(0.05)
    time.sleep(0.5)
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
def done():
    began = time.perf_counter()
    tracker.close("done")
    print("close took", time.perf_counter() - began)
"""


def run(
    run_dir, script, *, url=None, mode="auto", timeout_s=30, key=True, seconds=150, resume_step=None,
    checkpoints=False, variables=None, status=0,
):  # fmt: skip
    """The script, after START, in a new process with secrets around. -> what it printed"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(run_dir.parent), "SECRET_TOKEN": CANARY}
    environment |= {"WANDB_BASE_URL": url} if url else {}
    environment |= {"WANDB_API_KEY": CANARY.ljust(40, "0")} if key else {}
    environment |= {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"} | (variables or {})
    start = START.format(
        run_dir=str(run_dir), mode=mode, timeout_s=timeout_s, resume_step=resume_step, checkpoints=checkpoints
    )
    answer = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(script), f"--token={CANARY}"],
        env=environment, cwd=run_dir.parent, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert answer.returncode == status, answer.stderr
    return answer.stdout + answer.stderr


def inspect(run_dir):
    """The records of the newest offline directory, read with wandb's own tool."""
    newest = max(run_dir.glob("wandb/*run-*"), key=lambda path: path.stat().st_mtime)
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", newest]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"HOME": run_dir}
    )
    return [json.loads(line) for line in answer.stdout.splitlines()]


def sync(server, home, directory, *options):
    """`wandb sync`, as a person types it."""
    command = [Path(sys.executable).with_name("wandb"), "sync", *options, directory]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40, "HOME": str(home)}
    subprocess.run(command, env=environment, cwd=home, check=True, capture_output=True, text=True, timeout=60)


def history(records):
    return [record["history"]["item"] for record in records if "history" in record]


def leaks(run_dir):
    return [path for path in run_dir.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@contextmanager
def black_hole():
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as hole:
        yield f"http://127.0.0.1:{hole.getsockname()[1]}"
