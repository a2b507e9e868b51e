"""launch/wandb_sweep.yaml as `wandb agent` carries it out: its command, a real run, the record read back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb_server import Server

from framework.track import jsonl, panels

ROOT = Path(__file__).parents[2]
ID = "agentid1"


def told(sweep, chosen):
    """The command line that wandb's agent makes of the file and the parameters a sweep has chosen, and the
    variables it sets. `wandb_agent.Agent._command_run` joins them so; it needs the service for all else."""
    from wandb.sdk.launch.sweeps import utils

    of = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    of |= {"program": [sweep["program"]], "env": ["/usr/bin/env"]}
    words = []
    for word in map(str, utils.create_sweep_command(list(sweep["command"]))):
        words += of[word[2:-1]] if word.startswith("${") else [word]
    return words, {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": ID, "WANDB_PROJECT": "theirs"}


def test_every_parameter_and_word_is_one_of_ours():
    from framework.config.compose import check

    sweep = yaml.safe_load((ROOT / "launch" / "wandb_sweep.yaml").read_text())
    for schedule in sweep["parameters"]["schedule"]["values"]:
        words, _ = told(sweep, {"optim.lr": 3e-05, "schedule": schedule})
        assert words[:3] == ["/usr/bin/env", "python", "launch/train.py"]
        assert words[-2:] == ["optim.lr=3e-05", f"schedule={schedule}"]
        check(words[3:])
    assert sweep["metric"]["name"] == panels.OBJECTIVE


@pytest.mark.slow
def test_a_run_of_an_agent(tmp_path, tiny_model_dir):
    """It is the sweep's run, of the sweep's project, and its page says what metrics.jsonl says."""
    rows = [{"prompt": f"one two {'three ' * (i % 7)}", "completion": "four five six"} for i in range(24)]
    for name in ("mine", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep = yaml.safe_load((ROOT / "launch" / "wandb_sweep.yaml").read_text())
    words, variables = told(sweep, {"optim.lr": 3e-05, "schedule": "linear"})
    words = [word.replace("MODEL", str(tiny_model_dir)) for word in words]
    words[words.index("python")] = sys.executable
    words[words.index("launch/train.py")] = str(ROOT / "launch" / "train.py")
    words += ["steps=4", "evaluate.every=2", "evaluate.samples=0", "batch.sequences=4", "data.max_length=64"]
    words += ["launch.device=cpu", "run_dir=run", "checkpoint.export=false"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    server = Server()
    try:
        environment |= variables | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}
        environment |= {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
    finally:
        server.close()
    assert set(server.runs) == {ID}
    first = next(json.loads(body) for _, body in server.requests if "upsertBucket" in body)["variables"]
    assert (first["project"], first["sweep"], first["jobType"]) == ("theirs", "sweep1", "sft")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert json.loads(server.runs[ID]["summary"])["objective"] == result["objective"]
    shown = [
        {key: value for key, value in row.items() if not key.startswith("_") and key != "objective"}
        for row in server.rows
    ]
    expected = [
        panels.placed(line.pop("kind"), {k: v for k, v in line.items() if k != "step"})
        | {"step": line["step"]}
        for line in jsonl.read(tmp_path / "run" / "metrics.jsonl")
        if line["kind"] != "event"
    ]
    assert shown == expected
