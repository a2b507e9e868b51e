"""Runs of PPO, GRPO and DPO, killed or stopped in the middle of an iteration, go on as if nothing had been.

Compared are all lines that say what was trained on and what came of it: losses, rewards, KL, the answers.
"""

import json
import os
import random
import signal
import sys

import pytest
import test_kill as runs

STEPS, IN_ITERATION = 16, 4
ONLINE = [
    "stage.epochs=2",
    "batch.sequences=8",
    "rollout.max_new_tokens=10",
    "rollout.batch_size=4",
    "reward.functions=[{_target_: framework.rollout.rewards.regex, pattern: '[aeiou][a-z]'}]",
    "reward.workers=1",
]
STAGES = {  # each with what it keeps besides the data position
    "ppo": [*ONLINE, "stage=ppo", "stage.prompts=16", "stage.kl_target=1.0", "stage.kl_horizon=50"],
    "grpo": [
        *ONLINE,
        "stage=grpo",
        "stage.prompts=4",
        "rollout.samples=4",
        "stage.shaping.running=true",
        "adapter=lora",
    ],
    "dpo": ["stage=preference", "batch.sequences=8", "stage.reference=frozen", "stage.sync_every=3"],
}


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_model_dir):
    """name -> a command line on two ranks under FSDP2."""
    place = tmp_path_factory.mktemp("rl-kill")
    draw = random.Random(0)
    words = "one two three four five".split()
    with (place / "pairs.jsonl").open("w") as pairs, (place / "prompts.jsonl").open("w") as prompts:
        for i in range(60):
            prompt, *said = (" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(3))
            row = {"prompt": [{"role": "user", "content": f"{prompt} {i}"}]}
            prompts.write(json.dumps(row) + "\n")
            pairs.write(json.dumps(row | {"chosen": said[0] + ".", "rejected": said[1] + "!"}) + "\n")

    def line(name):
        data = "pairs" if name == "dpo" else "prompts"
        return [
            sys.executable,
            str(runs.ROOT / "launch" / "train.py"),
            *STAGES[name],
            f"model.path={tiny_model_dir}",
            f"data.train=[{{path: {place}/{data}.jsonl}}]",
            f"data.cache_dir={place}/cache",
            "data.max_length=64",
            "batch.tokens_per_micro=96",
            "optim.lr=1e-3",
            "strategy=fsdp",
            "launch.nproc=2",
            "launch.device=cpu",
            f"steps={STEPS}",
            f"checkpoint.every={IN_ITERATION}",
            "checkpoint.export=false",
            "tracker.every=1",
            "tracker.report=false",
        ]

    return line


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"undisturbed-{name}")
            assert runs.finish(runs.start(command(name), made[name])) == 0
            assert sorted(runs.lines(made[name], "train")) == list(range(1, STEPS + 1))
        return made[name]

    return get


def record(run_dir):
    """Everything but what was timed."""
    return {
        kind: {
            step: {key: value for key, value in line.items() if not key.startswith("seconds")}
            for step, line in runs.lines(run_dir, kind).items()
        }
        for kind in ("train", "rollout", "samples")
    }


def checkpoints(run_dir):
    return sorted(int(path.name.split("-")[1]) for path in (run_dir / "checkpoints").glob("step-??????"))


@pytest.mark.parametrize(("name", "step"), [("ppo", 5), ("grpo", 4), ("dpo", 5)])
def test_a_killed_rank_costs_an_iteration_and_no_number(name, step, command, undisturbed, tmp_path):
    """Killed after the first of an iteration's steps, and right before or in the next rollout."""
    process = runs.start(command(name), tmp_path)
    runs.wait_for_step(tmp_path, step)
    os.kill(runs.workers_of(tmp_path)[-1], signal.SIGKILL)
    assert runs.finish(process) not in (0, 2, 3)
    assert runs.workers_of(tmp_path) == []
    assert all(saved % IN_ITERATION == 0 for saved in checkpoints(tmp_path))
    assert max(runs.lines(tmp_path, "train")) < STEPS, "killed too late to mean anything"
    assert runs.finish(runs.start(command(name), tmp_path)) == 0
    found, expected = record(tmp_path), record(undisturbed(name))
    assert found == expected
    if name != "dpo":
        assert sorted(expected["rollout"]) == sorted(expected["samples"]) == [0, 4, 8, 12]
        assert len({line["reward"] for line in expected["rollout"].values()}) > 1


def test_a_stop_waits_for_the_end_of_the_iteration(command, undisturbed, tmp_path):
    line = [*command("ppo"), "checkpoint.every=null"]
    process = runs.start(line, tmp_path)
    runs.wait_for_step(tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    assert runs.finish(process) == 3
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert result["steps"] % IN_ITERATION == 0
    assert IN_ITERATION < result["steps"] < STEPS
    assert checkpoints(tmp_path) == [result["steps"]]
    assert runs.finish(runs.start(line, tmp_path)) == 0
    assert record(tmp_path) == record(undisturbed("ppo"))
