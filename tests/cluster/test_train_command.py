"""The command `launch/train.py`: by hand, in a sweep, under torchrun and deepspeed; refusals and stops.

What a run is inside is replaced (`program_train.py`); how it is launched is real.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__)
TRAIN = HERE.parents[2] / "launch" / "train.py"
PROGRAM = HERE.with_name("program_train.py")
SETTINGS = ["model.path=somewhere", "data.train=[{path: mine.jsonl}]", "launch.nproc=2"]
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


started = []  # launchers, ended with the test that started them


@pytest.fixture(autouse=True)
def _end_launchers():
    yield
    while started:
        process = started.pop()
        process.kill()
        process.wait()


def start(*arguments, cwd, program=PROGRAM, before=(sys.executable,), **variables):
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    process = subprocess.Popen(
        [*before, str(program), *SETTINGS, *arguments],
        cwd=cwd,
        env=environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


def finish(process, timeout_s=60):
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def runs(directory):
    return sorted(path.parent for path in directory.rglob("config.yaml"))


def result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def wait_until_waiting(directory, runs=1):
    deadline = time.monotonic() + 30
    while sum("waiting" in path.read_text() for path in directory.rglob("rank-*.log")) < 2 * runs:
        assert time.monotonic() < deadline, "no run has started to wait"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A directory with one finished run in it."""
    cwd = tmp_path_factory.mktemp("done")
    status, _, err = finish(start("seed=1", cwd=cwd))
    assert status == 0, err
    return cwd


def test_a_run_writes_its_directory_and_nothing_of_hydras(done):
    (run_dir,) = runs(done)
    assert run_dir.parent == done / "runs"
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert tree["seed"] == 1
    assert tree["launch"]["nproc"] == 2
    assert result(run_dir) == {"status": "done", "objective": 1.0}
    assert (done / "prepared.txt").read_text() == "1\n"  # once, though there were two ranks
    facts = [json.loads((done / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [fact["rank"] for fact in facts] == [0, 1]
    assert facts[0]["run_dir"] == facts[1]["run_dir"] == str(run_dir)
    written = {path.relative_to(done).parts[0] for path in done.rglob("*")}
    assert written == {"runs", "prepared.txt", "rank-0.json", "rank-1.json"}
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "result.json", "logs", "checkpoints"}


def test_a_finished_run_says_so_and_another_run_cannot_take_its_place(done):
    (run_dir,) = runs(done)
    again = start("seed=1", "launch.nproc=1", "batch.tokens_per_micro=9000", cwd=done)  # nothing decisive
    assert finish(again)[::2] == (0, f"{run_dir}: already done; its model and metrics are there\n")
    status, _, err = finish(start("seed=1", f"run_dir={run_dir}", "optim.lr=0.5", cwd=done))
    assert status == 2
    assert re.search(r"holds a run of other settings:\n  optim.lr: \S+ -> 0.5\nexpected", err), err
    status, _, err = finish(start("seed=1", "resume=never", cwd=done))
    assert status == 2
    assert "resume=never: " in err
    assert (done / "prepared.txt").read_text() == "1\n"
    assert not (run_dir / "lock").exists()


@pytest.mark.parametrize("key", ["optim.lrr=1e-5", "+optim.lrr=1e-5"])
def test_a_mistyped_key_is_refused_at_once_and_nothing_is_written(tmp_path, key):
    began = time.monotonic()
    status, _, err = finish(start(key, cwd=tmp_path, program=TRAIN))
    assert time.monotonic() - began < 15
    assert status == 2
    assert "optim.lr" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_refused_data_and_half_a_launcher_leave_nothing_behind(tmp_path):
    bad = start("seed=21", cwd=tmp_path)
    half = start("seed=1", cwd=tmp_path, RANK="0")
    sweep = start("-m", "seed=1,2", cwd=tmp_path, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    status, _, err = finish(bad)
    assert (status, err) == (2, "error: mine.jsonl:17: no assistant turn\n")
    status, _, err = finish(half)
    assert status == 2
    assert "not WORLD_SIZE and LOCAL_RANK" in err
    status, _, err = finish(sweep)
    assert status == 2
    assert "are for `python launch/train.py` alone" in err
    assert runs(tmp_path) == []
    assert list((tmp_path / "runs").iterdir()) == []


def test_hydras_questions_are_answered(tmp_path):
    asked = start("--cfg", "job", "--package", "launch", cwd=tmp_path, program=TRAIN)
    helped = start("--help", cwd=tmp_path, program=TRAIN)
    status, out, err = finish(asked)
    assert status == 0, err
    assert yaml.safe_load(out)["nproc"] == 2
    status, out, err = finish(helped)
    assert status == 0, err
    assert "strategy: ddp, fsdp, fsdp_offload, hsdp, zero1, " in out
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_loses_a_crashed_and_a_killed_job_and_no_other(tmp_path):
    """Six jobs of two workers: 13's rank 1 crashes, 14's is killed. Four results; the same line again makes
    the fifth and starts nothing else; the crash stays on record."""
    sweep = ("-m", "seed=1,13,14,2,3,4")
    status, _, err = finish(start(*sweep, cwd=tmp_path), timeout_s=400)
    assert status == 1
    assert "4 of 6 runs done" in err
    assert "job 1 failed: RuntimeError: the thirteenth (rank 1 " in err
    assert re.search(r"job 2 killed: rank 1 \(process \d+\) was ended by SIGKILL", err), err
    assert (tmp_path / "prepared.txt").read_text().split() == "1 13 14 2 3 4".split()
    status, _, err = finish(start(*sweep, cwd=tmp_path), timeout_s=200)
    assert status == 1
    assert "5 of 6 runs done" in err
    assert (tmp_path / "prepared.txt").read_text().split() == "1 13 14 2 3 4 14".split()
    found = {yaml.safe_load((path / "config.yaml").read_text())["seed"]: path for path in runs(tmp_path)}
    (sweep_dir,) = {path.parent for path in found.values()}
    assert sweep_dir.name.startswith("sweep-")
    results = {seed: result(path) for seed, path in found.items()}
    assert results.pop(13)["error"].startswith("error: rank 1 ")
    assert results == {seed: {"status": "done", "objective": float(seed)} for seed in (1, 14, 2, 3, 4)}
    rows = [float(text) for text in re.findall(r"job \d+</td><td>([\d.]+)</td>", page(sweep_dir))]
    assert rows == [1, 2, 3, 4, 14]  # best first


def page(sweep_dir):
    return (sweep_dir / "report.html").read_text()


def test_jobs_at_the_same_time_share_neither_devices_nor_ports(tmp_path):
    sweep = start(
        "-m",
        "seed=5,6",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        cwd=tmp_path,
        CUDA_VISIBLE_DEVICES="4,5,GPU-6,7",
    )
    status, _, err = finish(sweep, timeout_s=200)
    assert status == 0, err
    facts = [
        json.loads((tmp_path / f"begun-{seed}-{rank}.json").read_text()) for seed in (5, 6) for rank in (0, 1)
    ]
    assert sorted(fact["devices"] for fact in facts) == ["4,5", "4,5", "GPU-6,7", "GPU-6,7"]
    for name in ("devices", "port", "run_id", "run_dir"):
        first, second = facts[0][name], facts[2][name]
        assert [fact[name] for fact in facts] == [first, first, second, second]
        assert first != second, name


def test_a_stop_ends_a_sweep_and_a_directory_has_one_owner(tmp_path):
    sweep = start("-m", "seed=20,3", cwd=tmp_path)
    wait_until_waiting(tmp_path)
    (run_dir,) = runs(tmp_path)
    status, _, err = finish(start("seed=20", f"run_dir={run_dir}", cwd=tmp_path))
    assert status == 2
    assert re.search(r"is being trained in by process \d+ on ", err)
    status, _, err = finish(start("-m", "seed=20,3", cwd=tmp_path))
    assert status == 2
    assert "sweep-" in err
    assert "is being trained in by process " in err
    sweep.send_signal(signal.SIGINT)
    status, _, err = finish(sweep)
    assert status == 3, err
    assert runs(tmp_path) == [run_dir]
    assert result(run_dir)["status"] == "interrupted"
    assert not (run_dir / "lock").exists()


def test_a_refusal_of_one_rank_is_a_refusal_of_the_run(tmp_path):
    status, _, err = finish(start("seed=22", cwd=tmp_path))
    assert status == 2
    assert err.count("error: no such tokenizer") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_started_by_another_launcher_it_joins(tmp_path, launcher):
    """Rank 0 chooses the directory for rank 1, too; the data is prepared once; nothing else is written."""
    port = str(20000 + os.getpid() % 10000)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    before = {
        "torchrun": ("torchrun", "--standalone", "--nproc-per-node=2"),
        "deepspeed": (
            "deepspeed",
            "--hostfile=hosts",
            "--no_ssh",
            "--node_rank=0",
            "--master_addr=127.0.0.1",
        ),
    }[launcher]
    if launcher == "deepspeed":
        before += (f"--master_port={port}",)
    good = start("seed=4", cwd=tmp_path, before=before, DS_ACCELERATOR="cpu")
    status, _, err = finish(good)
    assert status == 0, err
    facts = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    (run_dir,) = runs(tmp_path)
    assert facts[0]["run_dir"] == facts[1]["run_dir"] == str(run_dir)
    assert [fact["world_size"] for fact in facts] == [2, 2]
    assert result(run_dir)["status"] == "done"
    assert (tmp_path / "prepared.txt").read_text() == "4\n"
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"runs", "hosts", "prepared.txt", "rank-0.json", "rank-1.json"}


def test_under_torchrun_a_refusal_reaches_every_rank(tmp_path):
    status, _, err = finish(
        start("optim.lrr=1", cwd=tmp_path, before=("torchrun", "--standalone", "--nproc-per-node=2"))
    )
    assert status != 0
    assert len(re.findall(r"^error: optim.lrr=1: no such key", err, re.MULTILINE)) == 1
    assert err.count("exitcode  : 2") == 2
    assert list(tmp_path.iterdir()) == []
