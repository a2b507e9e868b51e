"""A search over real training of a tiny model: the page's command repeats its best run, to the last digit."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def train(arguments, cwd):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_the_best_of_a_search_is_repeated_by_the_command_on_its_page(tmp_path, tiny_model_dir):
    rows = [{"prompt": f"one two {'three ' * (i % 7)}", "completion": "four five six"} for i in range(40)]
    for name, part in (("train", rows[:32]), ("held", rows[32:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    arguments = [
        "-m",
        "sweep=optuna",
        f"model.path={tiny_model_dir}",
        "data.train=[{path: train.jsonl}]",
        "data.eval=[{path: held.jsonl, name: task}]",
        "optim.lr=tag(log,interval(1e-5,1e-2))",
        "hydra.sweeper.n_trials=3",
        "data.max_length=64",
        "batch.sequences=4",
        "batch.tokens_per_micro=256",
        "steps=4",
        "evaluate.every=2",
        "evaluate.samples=0",
        "launch.device=cpu",
        "precision=fp32",
        "tracker.console=none",
    ]
    told = train(arguments, tmp_path)
    page = Path(re.search(r"3 of 3 runs done: (.*report.html)", told)[1])
    found = [json.loads(file.read_text()) for file in page.parent.glob("jobs/[!.]*.json")]
    results = {
        record["number"]: json.loads(Path(record["run_dir"], "result.json").read_text()) for record in found
    }
    losses = {number: result["metrics"]["task/loss"] for number, result in results.items()}
    assert {number: result["objective"] for number, result in results.items()} == losses
    assert len(set(losses.values())) == 3
    best = min(losses, key=losses.get)
    text = page.read_text()
    assert f"<h2>job {best}: task/loss {losses[best]:.6g}</h2>" in text
    command = re.search(r"<pre>python launch/train.py (.*?)</pre>", text)[1].replace("&#x27;", "'")
    train([*shlex.split(command), "run_dir=again"], tmp_path)
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["objective"] == losses[best]
