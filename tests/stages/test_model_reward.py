from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import workers
from online_toys import packing, prompts

from framework.batch import Scores
from framework.data.collate import collate
from framework.data.pack import plan
from framework.data.shared import collate_answers
from framework.rollout.base import Completion
from framework.stages.judge import ModelReward
from framework.strategy.world import Solo

ANSWERS = [Completion("", tuple(range(60, 60 + n)), True) for n in (3, 1, 5, 2, 4)]


def last_token(batch):
    """A scorer that names the token it was asked at, and counts the tokens up to it."""
    tokens = batch.input_ids.flatten()[batch.trained]
    return Scores(tokens.float() + batch.position_ids.flatten()[batch.trained] / 100)


def judge(world, packed=True):
    tools = packing(world, tokens=12)
    if not packed:
        tools = replace(
            tools,
            plan=partial(plan, tokens_per_micro=12, ranks=world.size, packing=False),
            collate=lambda examples: collate(examples, [0] * len(examples), packing=False, pad_id=0),
        )
    return ModelReward(last_token, packing=tools, world=world)(prompts(0, 5), ANSWERS).scores.tolist()


EXPECTED = [
    60 + len(answer.ids) - 1 + (len(prompt.ids) + len(answer.ids) - 1) / 100
    for prompt, answer in zip(prompts(0, 5), ANSWERS, strict=True)
]


@pytest.mark.parametrize("packed", [True, False])
def test_each_answer_is_scored_once_at_its_last_token(packed):
    alone = Solo(0, 1, 0, torch.device("cpu"))
    assert judge(alone, packed) == pytest.approx(EXPECTED, rel=1e-6)


def test_answers_to_one_prompt_share_its_tokens():
    """Two prompts with three answers each: the same scores, and each prompt is read once."""
    alone, read = Solo(0, 1, 0, torch.device("cpu")), []

    def model(batch):
        read.append(batch.tokens)
        return last_token(batch)

    asked = [prompt for prompt in prompts(0, 2) for _ in range(3)]
    given = [*ANSWERS[:3], *ANSWERS[2:]]
    scores = []
    for shared in (None, collate_answers):
        tools = replace(packing(alone), shared=shared)
        scores.append(ModelReward(model, packing=tools, world=alone)(asked, given).scores.tolist())
    assert scores[0] == scores[1]
    answers = sum(len(answer.ids) for answer in given)
    assert read == [answers + sum(len(prompt.ids) for prompt in each) for each in (asked, prompts(0, 2))]


def test_two_ranks_share_the_work_and_know_all_scores():
    for scores in workers.run(2, judge):
        assert scores == pytest.approx(EXPECTED, rel=1e-6)


def test_ranks_without_answers_still_ask_the_model():
    """One answer on two ranks: the second has a fill, for the collectives inside of a sharded model."""
    asked = []

    def model(batch):
        asked.append(batch.units)
        return last_token(batch)

    world = SimpleNamespace(rank=1, size=2, sum=lambda values: list(values))
    ModelReward(model, packing=packing(world), world=world)(prompts(0, 1), ANSWERS[:1])
    assert len(asked) == 1


def odd_ones_fail(world):
    """Each rank's judge knows its rank and fails on answers of odd length."""
    from framework.stages.judge import Dealt, Scored

    def reward(prompts, completions):
        scores = [float("nan") if len(c.ids) % 2 else 10.0 * world.rank + len(c.ids) for c in completions]
        return Scored(torch.tensor(scores), {"rank": float(world.rank), "calls": 1.0})

    said = Dealt(reward, world=world)(prompts(0, 5), ANSWERS)
    return said.scores.nan_to_num(-1).tolist(), said.metrics


def test_ranks_share_out_a_plain_reward_and_agree():
    """Answers of 3, 1, 5, 2, 4 tokens: rank 0 judges three of them, so the mean rank is 2 / 5."""
    for scores, metrics in workers.run(2, odd_ones_fail):
        assert scores == [-1, -1, -1, 12, 4]
        assert metrics == pytest.approx({"rank": 0.4, "calls": 1.0})


def test_more_ranks_than_answers():
    from framework.stages.judge import Dealt, Scored

    def reward(prompts, completions):
        assert prompts
        return Scored(torch.ones(1))

    idle = SimpleNamespace(
        rank=2, size=3, gather=lambda mine: [{"scores": [1.0], "metrics": {}}] * 2 + [mine]
    )
    assert Dealt(reward, world=idle)(prompts(0, 2), ANSWERS[:2]).scores.tolist() == [1.0, 1.0]
