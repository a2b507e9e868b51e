"""The files for schedulers and the page about them say what the command understands."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from framework.cluster import schedulers
from framework.config import compose

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text()
GIVEN = ["model.path=MODEL", "data.train=[{path: mine.jsonl}]"]
FLAGS_WITH_VALUES = {
    "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--rdzv-backend",
    "--rdzv-endpoint", "--rdzv-id", "--hostfile", "--node_rank", "--master_addr",
}  # fmt: skip


def settings(words):
    """What stands behind launch/train.py or launch/slurm.sbatch; `...` is the model and the data."""
    words = [word.removeprefix("/opt/sapwood/") for word in words]  # where the image has it
    (at,) = [i for i, word in enumerate(words) if word in ("launch/train.py", "launch/slurm.sbatch")]
    assert (ROOT / words[at]).is_file()
    told = [GIVEN if word == "..." else [word] for word in words[at + 1 :]]
    return [setting for group in told for setting in group]


def test_a_trainjob_is_understood_by_the_command():
    runtime, job = yaml.safe_load_all((ROOT / "launch" / "k8s.yaml").read_text())
    reference = job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    assert runtime["apiVersion"] == job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"  # the trainer looks for both names
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "node"
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}

    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    told = {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "sapwood-node-0-0.sapwood",
        "PET_MASTER_PORT": "29500",
    }
    run = compose.compose(
        [*schedulers.node(told).overrides(), *settings([*trainer["command"], *trainer["args"]])]
    )
    assert (run.launch.nnodes, run.launch.nproc, run.launch.node_rank) == (2, 8, 1)
    assert run.launch.grace_s < pod["terminationGracePeriodSeconds"]
    shared = container["volumeMounts"][0]["mountPath"]
    assert run.run_dir.startswith(f"{shared}/")
    assert run.data.cache_dir.startswith(f"{shared}/")


def test_a_sky_task_is_understood_by_the_command():
    task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    script = task["run"].replace("\\\n", "")
    for name, value in task["envs"].items():
        script = script.replace(f"${name}", value)
    assert "$" not in script
    nodes, gpus = task["num_nodes"], task["resources"]["accelerators"].partition(":")[2]
    told = {
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
        "SKYPILOT_NUM_GPUS_PER_NODE": gpus,
        "SKYPILOT_TASK_ID": "sky-1_mine_1",
    }
    run = compose.compose([*schedulers.node(told).overrides(), *settings(shlex.split(script))])
    assert (run.launch.nnodes, run.launch.nproc) == (nodes, int(gpus))
    (mount,) = task["file_mounts"]
    assert run.run_dir.startswith(f"{mount}/")
    (extra,) = re.findall(r"-e '\.\[(\w+)\]'", task["setup"])
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


def commands():
    blocks = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "train.py" in line or "sbatch" in line]


@pytest.mark.parametrize("line", commands())
def test_the_commands_of_the_page_compose(line):
    words = shlex.split(line.replace("HOST_OF_0", "10.0.0.1"))
    told = settings(words)
    if "model.path" not in line and "..." not in line:
        told += GIVEN
    run = compose.compose(told)
    assert run.data.train[0].path.endswith("mine.jsonl")
    flags = words[1 : words.index(next(word for word in words if word.startswith("launch/")))]
    alone = [flag for flag in flags if flag.startswith("-") and "=" not in flag]
    assert set(alone) <= {*FLAGS_WITH_VALUES, "--standalone", "--no_ssh", "--ntasks-per-node"}, alone


def test_the_page_names_files_that_exist():
    assert len(commands()) >= 8
    for name in re.findall(r"\b(?:launch|docker|tests)/[\w./-]+\w", PAGE):
        assert (ROOT / name).exists(), name
    for key in re.findall(r"`launch\.(\w+)", PAGE):
        assert key in (ROOT / "conf" / "launch" / "local.yaml").read_text()
