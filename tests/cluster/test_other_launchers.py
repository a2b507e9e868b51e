"""Joining the workers that torchrun or deepspeed has started on two "machines", both on this host.

What a run is inside is replaced (`program_train.py`); the launchers are the real ones, but for ssh and pdsh.
One machine: `test_train_command.py`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("program_train.py")
TRAIN = [str(PROGRAM), "model.path=somewhere", "data.train=[{path: my data.jsonl}]", "seed=4"]
BIN = Path(sys.executable).parent

PDSH = """#!/bin/bash
# pdsh -S -f N -w HOST,HOST WORDS...: the words, joined, to a shell on each host, %n its number.
while [[ $1 != -w ]]; do shift; done
hosts=${2//,/ }; shift 2; [[ -z $1 ]] && shift
number=0 status=0 tasks=()
for host in $hosts; do
  words="$*"
  bash -c "${words//%n/$number}" & tasks+=($!)
  number=$((number + 1))
done
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command, place):
    return subprocess.Popen(
        [*command, *TRAIN],
        cwd=place,
        env={**os.environ, "PATH": f"{place}:{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(kind, port, node):
    common = ["torchrun", "--nnodes=2", "--nproc-per-node=1"]
    if kind == "static":
        return [*common, f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    endpoint = f"--rdzv-endpoint=127.0.0.1:{port}"
    return [*common, "--rdzv-backend=c10d", endpoint, "--rdzv-id=mine", "--local-addr=127.0.0.1"]


def deepspeed(kind, port, node):
    alone = ["--no_ssh", f"--node_rank={node}"] if kind == "no_ssh" else []
    return ["deepspeed", "--hostfile=hosts", *alone, "--master_addr=127.0.0.1", f"--master_port={port}"]


@pytest.mark.parametrize(
    ("launcher", "kind", "typed"),
    [(torchrun, "static", 2), (torchrun, "c10d", 2), (deepspeed, "no_ssh", 2), (deepspeed, "pdsh", 1)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_two_machines_join(tmp_path, launcher, kind, typed):
    """`typed` is on how many machines the command is given. World and machines come from the variables."""
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    for name, text in {"pdsh": PDSH, "ssh": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    port = free_port()
    both = [start(launcher(kind, port, node), tmp_path) for node in range(typed)]
    try:
        for process in both:
            said, _ = process.communicate(timeout=180)
            assert process.returncode == 0, said
    finally:
        for process in both:
            process.kill()
            process.wait()
    facts = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [fact["world_size"] for fact in facts] == [2, 2]
    assert [fact["nproc"] for fact in facts] == [1, 1]
    (config,) = (tmp_path / "runs").rglob("config.yaml")
    text = config.read_text()
    assert "nnodes: 2" in text
    assert "my data.jsonl" in text
    assert json.loads(config.with_name("result.json").read_text())["status"] == "done"
