import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from framework.errors import ConfigError
from framework.losses.policy_gradient import ppo
from framework.rollout.base import Completion, Prompt
from framework.rollout.experience import Experience
from framework.stages.grpo import ADVANTAGES, Grpo
from framework.stages.penalty import KlPenalty

CASE = next(
    case
    for case in json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())["cases"]
    if case["name"] == "group_advantages"
)
LOSS = partial(ppo, clip_low=0.2, clip_high=0.2)


def experience(rewards=None, lengths=None, **tokens):
    """Three groups of four answers, as in the golden case."""
    rewards = rewards or CASE["inputs"]["rewards"]
    lengths = lengths or CASE["inputs"]["lengths"]
    said = [[Completion("", (5,) * n, True) for n in group] for group in lengths]
    prompts = [Prompt((1,), n) for n in range(len(rewards))]
    made = Experience.of(prompts, said, torch.tensor(rewards, dtype=torch.float64).flatten())
    return replace(made, **{k: torch.tensor(v, dtype=torch.float64) for k, v in tokens.items()})


def per_answer(e, name, **options):
    """The advantage of each answer's first token; all its tokens must have the same."""
    learnt, _ = Grpo(LOSS, temperature=1.0, advantages=name, **options).estimate(e)
    first = learnt.advantages[e.offsets[:-1]]
    torch.testing.assert_close(learnt.advantages, first[e.owners])
    return first


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("group_normalised", "grpo_trl_eps1e4"),
        ("group_centred", "dr_grpo"),
        ("leave_one_out", "rloo"),
        ("batch_scaled", "batch_std_trl"),
        ("length_weighted", "opo_length_weighted"),
        ("reinforce_plus_plus", "reinforce_pp_token_whitened"),
        ("reinforce_plus_plus_baseline", "reinforce_pp_baseline_token_whitened"),
    ],
)
def test_ways_to_compare_answers(name, golden):
    expected = torch.tensor(CASE["expected"][golden], dtype=torch.float64).flatten()
    torch.testing.assert_close(per_answer(experience(), name), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"teacher"}))  # which reads no reward
def test_a_failed_reward_is_as_if_the_answer_had_not_been(name):
    rewards = [[1.0, math.nan, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]
    lengths = [[3, 5, 2, 6], [2, 2, 2, 2]]
    got = per_answer(experience(rewards, lengths), name)
    assert got[1] == 0
    assert torch.isfinite(got).all()
    without = experience([[1.0, 0.0, 1.0]], [[3, 2, 6]])
    if name not in ("batch_scaled", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        torch.testing.assert_close(got[[0, 2, 3]], per_answer(without, name))


def test_a_penalty_lowers_the_score_of_a_whole_answer():
    """Scores 1 and 1, KL 0.5 + 0.5 and 0: with coefficient 0.4, 0.6 against 1, so -0.2 and 0.2."""
    e = experience([[1.0, 1.0]], [[2, 1]], old_logps=[0.5, 0.5, 0.0], reference_logps=[0.0, 0.0, 0.0])
    got = per_answer(e, "group_centred", penalty=KlPenalty(0.4))
    torch.testing.assert_close(got, torch.tensor([-0.2, 0.2], dtype=torch.float64))


def test_reinforce_plus_plus_pays_each_token_what_is_still_to_come():
    """Rewards to go 1 - 0.4 * (0.5 + 0.5), 1 - 0.2, and 0 for the other answer: whitened 0.6, 0.8, 0."""
    e = experience([[1.0, 0.0]], [[2, 1]], old_logps=[0.5, 0.5, 0.0], reference_logps=[0.0, 0.0, 0.0])
    learnt, _ = Grpo(
        LOSS, temperature=1.0, advantages="reinforce_plus_plus", penalty=KlPenalty(0.4)
    ).estimate(e)
    plain = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    torch.testing.assert_close(learnt.advantages, (plain - plain.mean()) / plain.std(), atol=1e-6, rtol=0)


def test_a_teacher_pays_each_token_by_itself_and_reads_no_reward():
    """log T - log S: -1 + 2, -3 + 0.5, and nothing for the answer that is masked."""
    e = experience([[9.0, -9.0]], [[2, 1]], old_logps=[-2.0, -0.5, -1.0], reference_logps=[-1.0, -3.0, 0.0])
    e = replace(e, counted=torch.tensor([True, False]))
    method = Grpo(LOSS, temperature=1.0, advantages="teacher")
    assert method.wants_reference
    learnt, _ = method.estimate(e)
    assert learnt.advantages.tolist() == [1.0, -2.5, 0.0]


def test_masked_answers_are_compared_but_not_trained_on():
    e = experience([[1.0, 0.0, 0.0, 1.0]], [[1, 1, 1, 1]])
    e = replace(e, counted=torch.tensor([False, True, True, True]))
    assert per_answer(e, "group_centred").tolist() == [0.0, -0.5, -0.5, 0.5]


def test_names_and_references():
    with pytest.raises(ConfigError, match="group_centred"):
        Grpo(LOSS, temperature=1.0, advantages="grouped")
    assert not Grpo(LOSS, temperature=1.0).wants_reference
    assert Grpo(partial(LOSS, kl=0.01), temperature=1.0).wants_reference
    assert Grpo(LOSS, temperature=1.0, penalty=KlPenalty(0.05)).wants_reference
