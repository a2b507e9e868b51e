"""Mistakes on the way to preferences, rewards and teachers: status 2, what was meant, no weight read.

The model's weights are cut in half, so that whoever reads them fails in another way.
"""

import json
from pathlib import Path

import launched
import pytest
import tiny

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
REWARDS = "framework.rollout.rewards"
BUDGET = ["replay=budget", "replay.sources=[{path: again.jsonl}]", "data.train=[{path: sft.jsonl}]"]
ASKED = ["retain.prompts=[{path: sums.jsonl, name: sums}]", f"retain.score={{_target_: {REWARDS}.exact}}"]

MISTAKES = {
    "conversations for preferences": (
        ["stage=preference", "data.train=[{path: sft.jsonl}]"],
        ["sft.jsonl:1: found fields messages; expected chosen and rejected", "for stage=sft"],
    ),
    "pairs for imitation": (
        ["data.train=[{path: pairs.jsonl}]"],
        ["pairs.jsonl:1: found fields chosen", "for stage=preference or stage=reward"],
    ),
    "pairs for kto": (
        ["stage=preference", "loss=kto", "data.train=[{path: pairs.jsonl}]"],
        ["expected prompt and completion and label", "for stage=preference or stage=reward"],
    ),
    "labels for dpo": (
        ["stage=preference", "data.train=[{path: labelled.jsonl}]"],
        ["expected chosen and rejected", "for stage=preference with loss=kto"],
    ),
    "dropout beside a reference": (
        ["stage=preference", "adapter=lora", "adapter.dropout=0.1", "data.train=[{path: pairs.jsonl}]"],
        ["adapter.dropout=0.1 in stage=preference", "type adapter.dropout=0"],
    ),
    "a reward that is mistyped": (
        ["stage=grpo", f"reward.functions=[{{_target_: {REWARDS}.exat}}]"],
        ["reward.functions[0]._target_: no exat in", f"{REWARDS}.exact"],
    ),
    "a reward's keyword that is mistyped": (
        ["stage=grpo", f"reward.functions=[{{_target_: {REWARDS}.exact, feild: answer}}]"],
        ["reward.functions[0].feild", "no such keyword", "reward.functions[0].field"],
    ),
    "a teacher of other words": (
        ["stage=distill", "stage.teacher=stranger", "data.train=[{path: sft.jsonl}]"],
        ["stage.teacher:", "stranger has another vocabulary than model.path="],
    ),
    "more candidates than tokens": (
        ["stage=distill", "stage.teacher=model", "stage.top_k=401", "data.train=[{path: sft.jsonl}]"],
        ["stage.top_k=401: both models know 400 tokens", "type stage.top_k=null"],
    ),
    "no reward": (["stage=grpo"], ["stage grpo and nothing that rewards", "reward=verifier"]),
    "an environment that is none": (
        [
            "stage=grpo",
            "reward=environment",
            "data.train=[]",
            "reward.environment._target_=framework.data.tasks.Family",
        ],
        ["Family is a class without rows and score; expected a class with the methods rows(split)"],
    ),
    "an environment's keyword that is not set": (
        ["stage=grpo", "reward=environment", "data.train=[]"],
        ["ReasoningGym needs it and it is not set; type +reward.environment.family=VALUE"],
    ),
    "a model that writes as a judge": (
        ["stage=ppo", "reward=model", "reward.model=model"],
        ["model holds no reward model, its head writes tokens", "expected RUN/model of a stage=reward run"],
    ),
    "a budget of accuracy without questions": (
        [*BUDGET, "replay.unit=accuracy"],
        [
            "a budget of accuracy and no questions to answer",
            "type 'retain.prompts=[{path: questions.jsonl}]'",
        ],
    ),
    "a budget of questions that are not asked": (
        [*BUDGET, *ASKED, "replay.unit=accuracy", "replay.max_forgetting={smus: 0.1}"],
        ["no questions of the name smus are asked", "type 'replay.max_forgetting={sums: 0.1}'"],
    ),
    "questions to an adapter that cannot be asked": (
        [*ASKED, "data.train=[{path: sft.jsonl}]", "adapter=dora"],
        ["adapter, retain.prompts: answers to be written", "type adapter=lora"],
    ),
    "more answers in a step than in an iteration": (
        [
            "stage=grpo",
            f"reward.functions=[{{_target_: {REWARDS}.exact}}]",
            "stage.prompts=2",
            "rollout.samples=2",
        ],
        ["8 answers a step of 4 in an iteration", "type batch.sequences=4"],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("refusals")
    weights = tiny.write(place / "model", tied=True) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    stranger = tiny.write(place / "stranger", tied=True)
    words = tiny.tokenizer()
    words.add_tokens(["<stranger>"])
    words.save_pretrained(stranger)
    config = json.loads((stranger / "config.json").read_text())
    (stranger / "config.json").write_text(json.dumps(config | {"vocab_size": len(words)}))
    prompt = [{"role": "user", "content": "one two"}]
    rows = {
        "again": {"text": "two three"},
        "sft": {"messages": [*prompt, {"role": "assistant", "content": "two one"}]},
        "pairs": {"prompt": prompt, "chosen": "two one", "rejected": "one two"},
        "labelled": {"prompt": prompt, "completion": "two one", "label": True},
        "prompts": {"prompt": prompt, "answer": "two one"},
        "sums": {"prompt": "three two", "answer": "two three"},
    }
    for name, row in rows.items():
        (place / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 16)
    return place


def train(place, *overrides):
    line = [
        "model.path=model",
        "data.train=[{path: prompts.jsonl}]",
        "data.cache_dir=cache",
        "data.max_length=64",
        "rollout.max_new_tokens=8",
        "batch.sequences=8",
        "launch.device=cpu",
        "steps=1",
        "run_dir=run",
    ]
    keys = {override.partition("=")[0] for override in overrides}
    line = [override for override in line if override.partition("=")[0] not in keys]
    return launched.forked(TRAIN, *line, *overrides, cwd=place)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_any_weight_is_read(mistake, place):
    overrides, told = MISTAKES[mistake]
    done = train(place, *overrides)
    assert done.returncode == 2, done.stderr
    assert all(part in done.stderr for part in told), done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "run").exists()


def test_the_weights_would_have_been_noticed(place):
    """Guards the guard: a line without a mistake reads them, and fails with another status."""
    done = train(place, "stage=preference", "data.train=[{path: pairs.jsonl}]")
    assert done.returncode not in (0, 2)
