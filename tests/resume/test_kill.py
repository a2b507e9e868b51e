"""Real runs of launch/train.py, killed in the middle: what comes after is what would have come anyway."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_model_dir):
    """Two ranks under FSDP2, LoRA with dropout, packing, a mixture with replay, bf16."""
    place = tmp_path_factory.mktemp("kill")
    rows = [
        {"prompt": f"one two {'three ' * (i % 7)}", "completion": f"four {'five ' * (i * 5 % 11)}"}
        for i in range(60)
    ]
    for name, part in {"task": rows[:40], "general": rows[40:50], "held": rows[50:]}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        f"model.path={tiny_model_dir}",
        f"data.train=[{{path: {place}/task.jsonl}}]",
        f"data.eval=[{{path: {place}/held.jsonl}}]",
        "replay=fixed",
        f"replay.sources=[{{path: {place}/general.jsonl}}]",
        "replay.fraction=0.2",
        f"data.cache_dir={place}/cache",
        "data.max_length=96",
        "batch.sequences=8",
        "batch.tokens_per_micro=96",
        "adapter=lora",
        "adapter.dropout=0.1",
        "strategy=fsdp",
        "launch.nproc=2",
        "launch.device=cpu",
        f"steps={STEPS}",
        "checkpoint.every=2",
        "checkpoint.export=false",
        "evaluate.every=4",
        "retain.every=3",
        "tracker.report=false",
    ]


def start(command, run_dir, *more):
    return subprocess.Popen(
        [*command, f"run_dir={run_dir}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def finish(process):
    """Its exit status, after everything it said was shown to pytest."""
    print(process.communicate(timeout=300)[0])
    return process.returncode


def lines(run_dir, kind):
    """step -> the numbers that decide, as written; a step that stands twice is an error."""
    found = {}
    path = Path(run_dir) / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        if line["kind"] == kind:
            assert line["step"] not in found, f"step {line['step']} stands twice in metrics.jsonl"
            times = ("seconds", "tokens_per_s", "tflops", "peak_memory_bytes", "time")
            found[line["step"]] = {name: value for name, value in line.items() if name not in times}
    return found


def wait_for_step(run_dir, step):
    """Until `step` is in metrics.jsonl: the run is inside the next one."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        path = Path(run_dir) / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text().replace('"step":', '"step": ').replace(
            "  ", " "
        ):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} did not come")


def workers_of(run_dir):
    """Process ids that have the run's directory in their environment or command line, ours not."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes()
                if b"--worker" in text and children_of_run(entry, run_dir):
                    found.append(int(entry.name))
            except OSError:
                continue
    return sorted(found)


def children_of_run(entry, run_dir):
    """Whether the process logs into `run_dir`."""
    return any(str(run_dir) in os.readlink(link) for link in (entry / "fd").iterdir() if os.path.islink(link))


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert finish(start(command, run_dir)) == 0
    assert sorted(lines(run_dir, "train")) == list(range(1, STEPS + 1))
    return run_dir


def same_record(run_dir, undisturbed):
    for kind in ("train", "eval", "retain"):
        assert lines(run_dir, kind) == lines(undisturbed, kind)


def test_a_killed_rank_ends_the_run_and_the_same_line_goes_on(command, undisturbed, tmp_path):
    process = start(command, tmp_path)
    wait_for_step(tmp_path, 3)
    victim = workers_of(tmp_path)[-1]
    os.kill(victim, signal.SIGKILL)
    assert finish(process) not in (0, 2, 3)
    assert workers_of(tmp_path) == []
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"
    assert finish(start(command, tmp_path)) == 0
    same_record(tmp_path, undisturbed)


def test_a_killed_launcher_leaves_no_orphan_and_the_same_line_goes_on(command, undisturbed, tmp_path):
    process = start(command, tmp_path)
    wait_for_step(tmp_path, 5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while workers_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers_of(tmp_path) == []
    assert finish(start(command, tmp_path)) == 0
    same_record(tmp_path, undisturbed)


def test_a_stop_saves_the_last_step_and_loses_nothing(command, undisturbed, tmp_path):
    """By Ctrl-C; test_rl_kill stops by SIGTERM."""
    process = start(command, tmp_path, "checkpoint.every=null")
    wait_for_step(tmp_path, 3)
    process.send_signal(signal.SIGINT)
    assert finish(process) == 3
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert (tmp_path / "checkpoints" / f"step-{result['steps']:06d}" / "manifest.json").exists()
    assert finish(start(command, tmp_path, "checkpoint.every=null")) == 0
    same_record(tmp_path, undisturbed)


def test_a_restart_by_the_launcher_itself(command, undisturbed, tmp_path):
    process = start(command, tmp_path, "launch.max_restarts=1")
    wait_for_step(tmp_path, 3)
    os.kill(workers_of(tmp_path)[0], signal.SIGKILL)
    assert finish(process) == 0
    same_record(tmp_path, undisturbed)


def test_evaluate_measures_the_checkpoint_as_training_did(undisturbed):
    """One process instead of two, so the order of sums differs: 1e-3 of the loss in bf16."""
    told = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "evaluate.py"), str(undisturbed), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(told.stdout.splitlines()[-1])
    result = json.loads((undisturbed / "result.json").read_text())
    assert found["step"] == STEPS
    assert found["metrics"]["held/units"] == result["metrics"]["held/units"]
    assert found["metrics"]["held/loss"] == pytest.approx(result["metrics"]["held/loss"], rel=1e-3)


@pytest.mark.parametrize("mistake", ["data.evl=[]", "optim.lr=-1", "="])
def test_evaluate_refuses_a_mistake_with_status_2(mistake, undisturbed):
    told = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "evaluate.py"), str(undisturbed), mistake],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 2
    assert told.stderr.startswith("error: ")
    assert "Traceback" not in told.stderr


def test_a_finished_run_is_not_done_again(command, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert finish(start(command, undisturbed)) == 0
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
