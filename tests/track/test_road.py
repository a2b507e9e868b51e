"""The page of a pipeline: what its steps measured, side by side; what none measured is absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_report import Page

from framework.track.jsonl import Jsonl
from framework.track.road import build

ROOT = Path(__file__).parents[2]


def step(place, name, kind, *, result, lines=(), config=None):
    where = place / f"{name}-12345678"
    where.mkdir()
    (where / "config.yaml").write_text(yaml.safe_dump(config or {"_target_": "own.steps"}))
    (where / "result.json").write_text(json.dumps(result))
    if lines:
        record = Jsonl(where / "metrics.jsonl")
        for number, (of, metrics) in enumerate(lines, start=1):
            record.log(of, metrics, step=number)
        record.close("done")
    return {name: {"kind": kind, "run_dir": str(where), "command": f"python launch/train.py name={name}"}}


@pytest.fixture
def run_dir(tmp_path):
    """sft, then grpo from its model, then what compares them; a step that has not begun."""
    evals = [("eval", {"task/loss": 2.0, "task/accuracy": 0.25}), ("eval", {"task/loss": 1.0})]
    sft = step(
        tmp_path,
        "sft",
        "sft",
        result={"status": "done", "steps": 20, "seconds": 75.0, "metrics": {"task/loss": 1.0}},
        lines=evals,
        config={"model": {"path": "start"}, "steps": 20},
    )
    rolls = [("rollout", {"reward": 0.25 * i, "kl": 0.1 * i, "entropy": 1.0}) for i in range(1, 4)]
    model = str(tmp_path / "sft-12345678" / "model")
    grpo = step(
        tmp_path,
        "grpo",
        "grpo",
        result={"status": "interrupted"},
        lines=rolls,
        config={"model": {"path": model}},
    )
    measured = {
        "sft": {"accuracy": [0.5, 0.4, 0.6], "general_loss": 1.25, "reward": -0.5},
        "grpo": {
            "accuracy": [0.75, 0.7, 0.8],
            "kl": 0.0625,
            "win_rate": [0.625, 0.5, 0.75],
            "judged_win_rate": [0.875, 0.75, 0.95],
            "reward": 1.25,
        },
    }
    samples = [{"prompt": "Reverse: <b>a b</b>", "reference": "b a", "sft": "a a", "grpo": "b a"}]
    compare = step(
        tmp_path,
        "compare",
        "step",
        result={
            "status": "done",
            "seconds": 5,
            "measured": measured,
            "against": "sft",
            "samples": samples,
            "facts": {"pairs": 206},
        },
    )
    later = {"dpo": {"kind": "preference", "run_dir": str(tmp_path / "dpo-1"), "command": "python x"}}
    stages = sft | grpo | compare | later
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"name": "my <road>", "stages": stages}, sort_keys=False)
    )
    return tmp_path


def test_what_was_measured_stands_side_by_side(run_dir):
    text = Page(build(run_dir).read_text()).text
    for expected in (
        "my <road> running", "2 of 4 steps done · 1 min 20 s",
        "sft 50.0% held-out accuracy, 95 %: 40.0% to 60.0%", "grpo 50.0% → 75.0%",
        "model held-out accuracy win rate over sft win rate over sft by the reward model reward KL to sft",
        "sft 50.0% [40.0%, 60.0%] -0.5 1.250",
        "grpo 75.0% [70.0%, 80.0%] 62.5% [50.0%, 75.0%] 87.5% [75.0%, 95.0%] 1.25 0.0625",
        "Reverse: <b>a b</b> reference b a sft a a grpo b a", "Reward of sampled answers",
        "KL to the start nats a token", "pairs 206", "python launch/train.py name=grpo",
        "dpo preference · not finished",
    ):  # fmt: skip
        assert expected in text, expected
    for absent in ("answer length", "Answer length", "Win rate against"):
        assert absent not in text


def test_a_reward_model_stands_beside_trivial_rankings(run_dir):
    ranked = {"length": 0.55, "the model's own log-probability": 0.92}
    result = {"status": "done", "facts": {"held-out pairs": 274}, "ranked": ranked}
    more = step(run_dir, "pairs", "step", result=result)
    held_out = {"path": str(run_dir / "pairs-12345678" / "held-out.jsonl"), "name": "pairs"}
    for name, right in (("good", 0.96), ("poor", 0.9)):
        result = {"status": "done", "metrics": {"pairs/rewards/accuracy": right, "pairs/loss": 0.2}}
        config = {"model": {"path": "start"}, "data": {"eval": [held_out]}}
        more |= step(run_dir, name, "reward", result=result, config=config)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["stages"] |= more
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    text = Page(build(run_dir).read_text()).text
    beside = "held-out pairs ranked right; by length 55.0%; by the model's own log-probability 92.0%"
    assert f"good 96.0% {beside}" in text
    assert f"poor 90.0% {beside}" in text
    assert "held-out pairs ranked by length 0.55" in text


def test_each_quantity_has_one_chart_with_a_line_for_each_step(run_dir):
    """Reward, KL and entropy of grpo's rollouts; accuracy and loss of sft's evaluations."""
    text = build(run_dir).read_text()
    page = Page(text)
    assert page.tags.count("svg") == 5
    assert "grpo, step 3: 0.75" in text
    assert "sft task, step 2: 1" in text
    assert not {"script", "link", "img", "a"} & set(page.tags)


def test_it_can_be_made_again_by_hand_without_torch(run_dir):
    command = [sys.executable, "-X", "importtime", "-m", "framework.track.road", run_dir]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ)
    assert answer.stdout.strip() == str(run_dir / "report.html")
    assert " torch\n" not in answer.stderr
    refused = subprocess.run([*command[:-1], ROOT], cwd=ROOT, capture_output=True, text=True)
    assert "type: python -m framework.track.road RUN_DIR" in refused.stderr
