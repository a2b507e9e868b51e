"""Both families learn a task that a random model almost never solves."""

import online_worlds
import pytest
import torch

from framework.rollout.base import Sampling
from framework.stages.online import Plan
from framework.stages.penalty import KlPenalty
from framework.strategy.world import Solo
from framework.train.meter import Meter

pytestmark = pytest.mark.slow

WANTED = range(100, 120)  # 20 of 400 tokens
MOST_STEPS = 80


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_an_answer_that_begins_with_one_of_few_tokens_is_learnt(tiny_model_dir, kind):
    """From a reward under 0.1 to 0.9 within 80 optimizer steps."""
    samples = 8 if kind == "grpo" else 1
    engine, rl = online_worlds.stage(
        Solo(0, 1, 0, torch.device("cpu")),
        tiny_model_dir,
        kind,
        reward=online_worlds.first_of(WANTED),
        plan=Plan(prompts=128 // samples, sequences=64, epochs=1 if kind == "grpo" else 2, shown=0),
        sampling=Sampling(2, temperature=1.0, samples=samples, seed=1),
        **({"penalty": KlPenalty()} if kind == "ppo" else {}),
    )
    meter = Meter(engine.world)
    rewards = []
    for step in range(MOST_STEPS):
        _, _, rollouts = online_worlds.take(engine, rl, meter, step, lr=1e-2)
        rewards += [metrics["reward"] for metrics in rollouts]
        if rewards[-1] > 0.9:
            break
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.9, rewards
