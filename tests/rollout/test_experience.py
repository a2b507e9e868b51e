from functools import partial

import pytest
import torch

from framework.data.collate import collate, fill
from framework.data.pack import plan
from framework.rollout.base import Completion, Prompt
from framework.rollout.experience import (
    Experience,
    Packing,
    Running,
    Shaping,
    cut,
    minibatches,
    rollout_batches,
    spread,
    token_rewards,
)

NAN = float("nan")


def packing(rank=0, ranks=1, *, tokens=12, packed=True):
    return Packing(
        plan=partial(plan, tokens_per_micro=tokens, ranks=ranks, packing=packed),
        collate=lambda examples: collate(examples, [0] * len(examples), packing=packed, pad_id=0),
        fill=partial(fill, packing=packed, pad_id=0),
        tokens_per_micro=tokens,
        rank=rank,
    )


def experience(rewards=(1.0, 0.0, 0.5, NAN, 2.0, 2.0)):
    """Three prompts of 2, 3 and 1 tokens with two answers each, of 3, 1, 2, 4, 1 and 2 tokens.

    An answer token is 100 * (answer + 1) + its place, so that a token says where it belongs.
    """
    prompts = [Prompt((11, 12), 0), Prompt((21, 22, 23), 1), Prompt((31,), 2)]
    lengths = [[3, 1], [2, 4], [1, 2]]
    answers, number = [], 0
    for group in lengths:
        answers.append([])
        for length in group:
            number += 1
            ids = tuple(100 * number + t for t in range(length))
            answers[-1].append(Completion("x", ids, finished=number != 4, logps=(-1.0,) * length))
    return Experience.of(prompts, answers, torch.tensor(rewards))


def known(e):
    """Advantages that repeat the token, so that a batch shows whether they stand at the right place."""
    from dataclasses import replace

    tokens = torch.tensor([t for c in e.completions for t in c.ids], dtype=torch.float64)
    return replace(e, advantages=tokens, old_logps=-tokens)


def test_answers_lie_end_to_end_and_a_failed_reward_is_not_counted():
    e = experience()
    assert e.groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert e.offsets.tolist() == [0, 3, 4, 6, 10, 11, 13]
    assert e.counted.tolist() == [True, True, True, False, True, True]
    assert e.owners.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5]
    assert e.sampler_logps.shape == (13,)


def test_a_group_has_spread_when_its_known_scores_differ():
    """The second group has one score besides a NaN, the third twice the same."""
    e = experience()
    assert spread(e.rewards, e.groups).tolist() == [True, False, False]
    seven = torch.full((7,), 0.3)
    assert spread(seven, torch.zeros(7, dtype=torch.int64)).tolist() == [False]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_every_token_comes_once_with_its_own_numbers(ranks, packed):
    e = known(experience([1.0] * 6))
    seen, micros = [], set()
    for rank in range(ranks):
        batches = rollout_batches(
            e, range(6), packing(rank, ranks, packed=packed), averaging="token", longest=4
        )
        micros.add(len(batches))
        for batch in batches:
            if batch.units:
                assert batch.advantages.tolist() == batch.targets.tolist()
                assert batch.old_logps.tolist() == [-t for t in batch.targets.tolist()]
                seen += batch.targets.tolist()
    assert len(micros) == 1
    assert sorted(seen) == sorted(t for c in e.completions for t in c.ids)


def test_ways_of_averaging_are_weights_and_units():
    """Five counted answers of 3, 1, 2, 1 and 2 tokens: nine tokens; the fourth of 4 tokens is not counted."""
    e = known(experience())
    totals = {}
    for averaging in ("token", "sequence", "constant"):
        batches = [
            batch
            for rank in range(2)
            for batch in rollout_batches(e, range(6), packing(rank, 2), averaging=averaging, longest=4)
        ]
        weights = sum(float(batch.weights.sum()) for batch in batches)
        totals[averaging] = (weights, sum(batch.units for batch in batches))
        for batch in batches:
            for weight, token in zip(batch.weights.tolist(), batch.targets.tolist(), strict=True):
                if 400 <= token < 500:
                    assert weight == 0
    assert totals == {"token": (9.0, 9.0), "sequence": (5.0, 5.0), "constant": (9 / 4, 5.0)}


def test_a_shared_prompt_stands_once_and_answers_keep_their_numbers():
    """Budget 9: prompt 0 with both answers is 6 tokens; prompt 1 with 2 + 4 is 9; prompt 2 with 1 + 2 is 4.

    The collation given here interleaves segments, as positions in ascending order do: the last prompt token
    predicts the first token of every answer.
    """
    calls = []

    def shared(families):
        calls.extend(families)
        rows = [((*prompt, *answer), len(prompt)) for prompt, answers in families for answer in answers]
        batch = packing().collate(
            [(torch.tensor(ids).numpy(), torch.arange(len(ids)).numpy() >= n) for ids, n in rows]
        )
        order = torch.arange(len(batch.trained)).flip(0).argsort(stable=True)
        first = torch.tensor(
            [i == 0 or batch.segments[i] != batch.segments[i - 1] for i in range(len(order))]
        )
        order = torch.cat([first.nonzero()[:, 0], (~first).nonzero()[:, 0]])
        from dataclasses import replace

        return replace(batch, targets=batch.targets[order], segments=batch.segments[order])

    from dataclasses import replace

    tools = replace(packing(tokens=9), shared=shared)
    batches = rollout_batches(known(experience([1.0] * 6)), range(6), tools, averaging="token", longest=4)
    assert sorted((len(p), len(a)) for p, a in calls) == [(1, 2), (2, 2), (3, 2)]
    for batch in batches:
        assert batch.advantages.tolist() == batch.targets.tolist()
    calls.clear()
    cut(experience(), range(6), replace(tools, tokens_per_micro=8))
    assert sorted((len(p), len(a)) for p, a in calls) == [(1, 2), (2, 2), (3, 1), (3, 1)]


def test_minibatches_hold_every_answer_once_and_keep_groups_together():
    e = experience()
    for sequences, sizes in ((2, [2, 2, 2]), (4, [3, 3]), (6, [6]), (5, [3, 3])):
        parts = minibatches(e, sequences=sequences, order=torch.Generator().manual_seed(3))
        assert [len(part) for part in parts] == sizes
        line = [s for part in parts for s in part]
        assert sorted(line) == list(range(6))
        assert [s // 2 for s in line[::2]] == [s // 2 for s in line[1::2]]
    orders = {
        tuple(map(tuple, minibatches(e, sequences=2, order=torch.Generator().manual_seed(seed))))
        for seed in range(9)
    }
    assert len(orders) > 1


def test_scores_are_shaped_in_order_and_land_on_the_last_token():
    """Golden case: scores 2.5 (ended) and -0.5 (not), penalty 1, clip 2: 2.0 and -1.5."""
    seen = Running()
    shape = Shaping(missing_eos_penalty=1.0, clip=2.0)
    scores = shape(torch.tensor([2.5, -0.5]).double(), torch.tensor([True, False]), seen)
    assert scores.tolist() == [2.0, -1.5]
    penalties = torch.tensor([0.1, -0.2, 0.4, -0.5, -0.1, 0.5, -0.3], dtype=torch.float64) * 0.05
    rewards = token_rewards(scores, torch.tensor([0, 4, 7]), penalties)
    expected = torch.tensor([-0.005, 0.01, -0.02, 2.025, 0.005, -0.025, -1.485], dtype=torch.float64)
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-12)
    fixed = Shaping(mean=1.0, std=2.0, missing_eos_penalty=1.0)
    assert fixed(torch.tensor([3.0, 3.0]).double(), torch.tensor([True, False]), seen).tolist() == [1.0, 0.0]
    assert seen.count == 0
    assert token_rewards(torch.tensor([NAN, 1.0]).double(), torch.tensor([0, 1, 2])).tolist() == [0.0, 1.0]


def test_scores_within_a_prompt_begin_from_its_mean():
    """1, 3 and a failure: mean 2; 7 alone: 0; deviations of -1, 1, 0: 1. One without an end loses 10."""
    seen = Running()
    shape = Shaping(within_prompt=True, running=True, missing_eos_penalty=10.0)
    rewards, ended = torch.tensor([1.0, 3.0, NAN, 7.0]).double(), torch.tensor([True, False, True, True])
    scores = shape(rewards, ended, seen, torch.tensor([0, 0, 0, 1]))
    assert scores[[0, 1, 3]].tolist() == [-1.0, 1.0 - 10.0, 0.0]
    assert scores[2].isnan()
    assert (seen.count, seen.mean) == (3.0, 0.0)


def test_running_moments_are_those_of_all_scores_so_far():
    """1, 2, 3 and then 6, 8: mean 4, squared deviations 9 + 4 + 1 + 4 + 16 = 34, variance 34 / 4."""
    seen = Running()
    assert seen.std == 1.0
    shape = Shaping(running=True)
    shape(torch.tensor([1.0, NAN, 2.0, 3.0]).double(), torch.ones(4, dtype=torch.bool), seen)
    scores = shape(torch.tensor([6.0, 8.0]).double(), torch.ones(2, dtype=torch.bool), seen)
    assert (seen.count, seen.mean, seen.squares) == (5.0, 4.0, 34.0)
    assert scores.tolist() == pytest.approx([2 / 8.5**0.5, 4 / 8.5**0.5])
    seen = Running()
    seen.add(torch.tensor([5.0, 5.0]))
    assert seen.std == 1.0
