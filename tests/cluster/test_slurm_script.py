"""launch/slurm.sbatch, run by bash with `srun` and `scontrol` played by scripts: two nodes on this machine.

What the script does with signals and exit statuses is tried with a stand-in for launch/train.py that starts
at once; the way of a real run over the time limit, with the real one and a tiny model.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"

SRUN = """
    #!{python} -IS
    # One task on each of two nodes; passes signals on; ends with the highest status. As srun(1) says.
    import os, signal, subprocess, sys, time
    arguments = sys.argv[1:]
    while arguments[0].startswith("--"):
        open("srun-options", "a").write(arguments.pop(0) + "\\n")
    tasks = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
    for node in range(2):
        step = dict(STEP_ID=0, STEP_NUM_NODES=2, STEP_NUM_TASKS=2, NODEID=node, STEP_NODELIST="localhost")
        told = {{f"SLURM_{{name}}": str(value) for name, value in step.items()}}
        tasks.append(subprocess.Popen(arguments, env=os.environ | told))
    sys.exit(max(task.wait() if task.wait() >= 0 else 128 - task.wait() for task in tasks))
"""

SCONTROL = """
    #!/bin/sh
    echo "$@" >> scontrol-calls
"""

STAND_IN = """
    # Plays a run: `done`, `refused`, `failed`, or one that waits for a signal and then saves, or cannot.
    import json, os, signal, sys, time
    node, play = os.environ["SLURM_NODEID"], sys.argv[1]
    json.dump(sys.argv[1:], open(f"arguments-{node}", "w"))
    ends = {"done": 0, "refused": 2, "failed": 1}
    if play in ends:
        sys.exit(ends[play])
    got = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: got.append(number))
    open(f"waiting-{node}", "w").close()
    while not got:
        time.sleep(0.02)
    time.sleep(0.3)  # saving
    open(f"ended-{node}", "w").write(signal.Signals(got[0]).name)
    sys.exit({"saves": 3, "breaks": 1}[play])
"""


def write(path, text, mode=0o755):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())
    path.chmod(mode)


@pytest.fixture
def sbatch(tmp_path):
    """sbatch(*arguments): the script as the batch step would run it, in a directory of its own."""
    write(tmp_path / "bin" / "srun", SRUN.format(python=sys.executable))
    write(tmp_path / "bin" / "scontrol", SCONTROL)
    write(tmp_path / "clone" / "launch" / "train.py", STAND_IN)
    started = []

    def start(*arguments, root=tmp_path / "clone", **variables):
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SAPWOOD": str(root),
            "SLURM_JOB_ID": "4711",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            **variables,
        }
        process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(*paths, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not come"
        time.sleep(0.02)


def requeued(tmp_path):
    calls = tmp_path / "scontrol-calls"
    return calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize(("play", "status"), [("done", 0), ("refused", 2), ("failed", 1)])
def test_the_status_of_the_run_is_that_of_the_job(sbatch, tmp_path, play, status):
    given = [play, "data.train=[{path: my data.jsonl}]", "name='a b'", "$HOME"]
    assert sbatch(*given).wait(60) == status
    assert [json.loads((tmp_path / f"arguments-{node}").read_text()) for node in (0, 1)] == [given] * 2
    options = (tmp_path / "srun-options").read_text().split()
    assert {"--ntasks-per-node=1", "--kill-on-bad-exit=0"} <= set(options)
    assert requeued(tmp_path) == ""


def test_the_time_limit_saves_and_puts_the_job_back(sbatch, tmp_path):
    process = sbatch("saves")
    wait_for(tmp_path / "waiting-0", tmp_path / "waiting-1")
    process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B:USR1@120 says
    assert process.wait(60) == 0
    assert [(tmp_path / f"ended-{node}").read_text() for node in (0, 1)] == ["SIGUSR1"] * 2
    assert requeued(tmp_path) == "requeue 4711\n"


def test_what_could_not_be_saved_is_not_put_back(sbatch, tmp_path):
    """It would start where it stood, meet the same limit and never end."""
    process = sbatch("breaks")
    wait_for(tmp_path / "waiting-0", tmp_path / "waiting-1")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 1
    assert requeued(tmp_path) == ""


def test_scancel_saves_and_ends(sbatch, tmp_path):
    """SLURM tells the tasks and this script, which has to outlive them and must not put the job back."""
    process = sbatch("saves")
    wait_for(tmp_path / "waiting-0", tmp_path / "waiting-1")
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(tmp_path / "clone" / "launch" / "train.py").encode() in words and b"srun" not in words[2]:
            os.kill(int(line.parent.name), signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3
    assert [(tmp_path / f"ended-{node}").read_text() for node in (0, 1)] == ["SIGTERM"] * 2
    assert requeued(tmp_path) == ""


def test_started_elsewhere_it_says_what_to_type(sbatch, tmp_path):
    process = sbatch("done", root=tmp_path / "nowhere")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "SAPWOOD=DIRECTORY sbatch" in out


def test_the_script_is_clean():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    text = SCRIPT.read_text()
    head = text.partition("\nset -uo pipefail")[0]
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in head.splitlines()
        if line.startswith("#SBATCH --")
    )
    assert options["ntasks-per-node"] == "1"
    assert options["signal"] == "B:USR1@120"
    assert "requeue" in options
    assert "#SBATCH" not in text.removeprefix(head), "SLURM reads no options behind the first command"
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(SCRIPT)]).returncode == 0


def steps(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "train"]


def test_a_real_run_goes_over_the_time_limit(sbatch, tmp_path, tiny_model_dir):
    """Two nodes of one rank each under FSDP2: stopped, put back, started again, every step taken once."""
    rows = [
        {"prompt": f"one two {'three ' * (i % 7)}", "completion": f"four {'five ' * (i % 5)}"}
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = tmp_path / "run"
    command = [
        f"model.path={tiny_model_dir}",
        f"data.train=[{{path: {tmp_path}/rows.jsonl}}]",
        f"data.cache_dir={tmp_path}/cache",
        f"run_dir={run_dir}",
        "data.max_length=64",
        "batch.sequences=4",
        "batch.tokens_per_micro=96",
        "strategy=fsdp",
        "launch.device=cpu",
        "checkpoint.every=null",
        "checkpoint.export=false",
        "tracker.report=false",
        "retain.builtin=false",
        "steps=2000",
    ]
    process = sbatch(*command, root=ROOT)
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists() or len(steps(run_dir)) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert requeued(tmp_path) == "requeue 4711\n"
    stopped = json.loads((run_dir / "result.json").read_text())
    assert stopped["status"] == "interrupted"
    assert (run_dir / "checkpoints" / f"step-{stopped['steps']:06d}" / "manifest.json").exists()
    again = sbatch(*command[:-1], "steps=2000", root=ROOT)  # the same job, the same line
    while steps(run_dir)[-1] <= stopped["steps"] + 2:
        assert again.poll() is None, again.communicate()[0]
        assert time.monotonic() < deadline + 240
        time.sleep(0.05)
    again.send_signal(signal.SIGUSR1)
    assert again.wait(120) == 0
    assert steps(run_dir) == list(range(1, steps(run_dir)[-1] + 1))
