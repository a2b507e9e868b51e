import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import online_worlds
import pytest
import torch
import workers
from online_toys import FixedEngine

from framework.errors import ConfigError
from framework.losses.policy_gradient import ppo
from framework.losses.value import value_loss
from framework.rollout.base import Completion, Prompt
from framework.rollout.experience import Experience
from framework.stages.penalty import KlPenalty
from framework.stages.ppo import Estimation, Ppo
from framework.strategy.world import Solo

GOLDEN = {
    case["name"]: case
    for case in json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())["cases"]
}


def answers(lengths, rewards, *, finished=None, **tokens):
    """One answer to each prompt; what is known of the tokens is given end to end."""
    prompts = [Prompt((1, 2), n) for n in range(len(lengths))]
    finished = finished or [True] * len(lengths)
    said = [[Completion("", (5,) * n, done)] for n, done in zip(lengths, finished, strict=True)]
    known = {name: torch.tensor(values, dtype=torch.float64) for name, values in tokens.items()}
    return replace(Experience.of(prompts, said, torch.tensor(rewards, dtype=torch.float64)), **known)


def method(**options):
    settings = {"penalty": KlPenalty(), "estimation": Estimation()} | options
    return Ppo(
        partial(ppo, clip_low=0.2, clip_high=0.2),
        partial(value_loss, clip=0.2),
        temperature=1.0,
        **settings,
    )


def close(ours, theirs):
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0)])
def test_advantages_and_returns_of_the_golden_case(gamma, lam):
    """The golden rewards are 0, 0, 1 and -0.1, 0, 2 once the masked tokens of the second answer are left out.

    Minus the KL penalty, so a log-ratio of +0.1 with coefficient 1 makes its first token's -0.1.
    """
    e = answers(
        [3, 3],
        [1.0, 2.0],
        old_values=[0.5, 0.6, 0.7, 0.2, 0.3, 1.1],
        old_logps=[0.0, 0.0, 0.0, 0.1, 0.0, 0.0],
        reference_logps=[0.0] * 6,
    )
    expected = GOLDEN["gae"]["expected"][f"gamma={gamma},lambda={lam}"]

    def kept(rows):
        return [*rows[0], *(rows[1][t] for t in (0, 1, 4))]

    plain = Estimation(gamma=gamma, gae_lambda=lam, whiten_advantages=False)
    learnt, _ = method(penalty=KlPenalty(1.0), estimation=plain).estimate(e)
    close(learnt.advantages, kept(expected["advantages"]))
    close(learnt.returns, kept(expected["returns"]))
    white, _ = method(penalty=KlPenalty(1.0), estimation=replace(plain, whiten_advantages=True)).estimate(e)
    close(white.advantages, kept(expected["whitened_unbiased_eps1e8"]))
    close(white.returns, kept(expected["returns"]))  # the critic learns what is not whitened


def test_a_failed_reward_teaches_neither_actor_nor_critic():
    tokens = {"old_values": [0.5, 0.1, 3.0, 4.0], "old_logps": [0.0] * 4, "reference_logps": [0.0] * 4}
    learnt, _ = method().estimate(answers([2, 2], [1.0, float("nan")], **tokens))
    close(learnt.advantages[2:], [0.0, 0.0])
    close(learnt.returns[2:], [0.0, 0.0])
    assert learnt.counted.tolist() == [True, False]
    first = {name: values[:2] for name, values in tokens.items()}
    alone, _ = method().estimate(answers([2], [1.0], **first))
    torch.testing.assert_close(learnt.advantages[:2], alone.advantages)


def test_rewards_can_be_divided_by_their_deviation():
    """Rewards 0, 1, 0, 3: mean 1, variance (1 + 0 + 1 + 4) / 3 = 2; whitened with the mean kept."""
    plain = Estimation(gae_lambda=1.0, whiten_rewards=True, whiten_advantages=False)
    learnt, _ = method(estimation=plain).estimate(answers([2, 2], [1.0, 3.0], old_values=[0.0] * 4))
    low, mid, high = (1 + x / 2**0.5 for x in (-1.0, 0.0, 2.0))
    torch.testing.assert_close(
        learnt.advantages,
        torch.tensor([low + mid, mid, low + high, high], dtype=torch.float64),
        rtol=1e-7,
        atol=0,
    )


def test_the_coefficient_follows_the_distance_and_is_kept():
    """Golden controller: start 0.2, target 6, horizon 10000, n 256 answers."""
    case = GOLDEN["kl_token_rewards_controller"]
    settings = case["inputs"]["controller"]
    for observed, expected in zip(
        settings["observed"], case["expected"]["controller_next_coef"], strict=True
    ):
        penalty = KlPenalty(settings["init"], target=settings["target"], horizon=settings["horizon"])
        n = settings["n_steps"]
        e = answers([1] * n, [0.0] * n, old_logps=[observed] * n, reference_logps=[0.0] * n)
        metrics = penalty.follow(e)
        assert metrics["kl_coefficient"] == settings["init"]
        assert metrics["kl_per_answer"] == pytest.approx(observed)
        assert penalty.coefficient == pytest.approx(expected, abs=1e-12)
    ours = method(penalty=penalty)
    theirs = method(penalty=KlPenalty(0.2, target=6.0))
    theirs.load_state_dict(json.loads(json.dumps(ours.state_dict())))
    assert theirs.penalty.coefficient == penalty.coefficient


def test_the_distance_is_that_of_whole_answers_that_count():
    """Log-ratios 0.5 + 0.25 and 1.0; the third answer failed: mean 0.875 nats per answer."""
    e = answers(
        [2, 1, 1],
        [0.0, 0.0, float("nan")],
        old_logps=[0.5, 0.25, 1.0, 9.0],
        reference_logps=[0.0] * 4,
    )
    assert KlPenalty(0.1).follow(e)["kl_per_answer"] == 0.875


def test_an_adaptive_coefficient_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="never leaves 0"):
        KlPenalty(0.0, target=6.0)


def test_a_reference_is_wanted_by_the_penalty_or_by_the_loss():
    assert not method().wants_reference
    assert method(penalty=KlPenalty(0.05)).wants_reference
    loss = partial(ppo, clip_low=0.2, clip_high=0.2, kl=0.01)
    with_kl = Ppo(loss, value_loss, temperature=1.0, penalty=KlPenalty(), estimation=Estimation())
    assert with_kl.wants_reference


def test_policy_and_value_loss_add_up_per_token():
    """Golden losses: 0.29634 + 0.1 * 0.1075 = 0.30709 as a token mean."""
    case = GOLDEN["ppo_losses"]
    given = case["inputs"]

    def flat(name):
        return torch.tensor([x for row in given[name] for x in row], dtype=torch.float64)

    both = Ppo(
        partial(ppo, clip_low=given["clip_low"], clip_high=given["clip_high"]),
        partial(value_loss, clip=given["value_clip"]),
        temperature=1.0,
        penalty=KlPenalty(),
        estimation=Estimation(),
        value_scale=given["vf_coef"],
        critic_warmup=1,
    )

    class Batch:
        weights, segments = torch.ones(5), torch.tensor([0, 0, 0, 1, 1])
        old_logps, advantages = flat("old_logp"), flat("advantages")
        old_values, returns = flat("old_values"), flat("returns")
        correction = reference_logps = None

        def to(self, device):
            return self

    class Engine(FixedEngine):
        def __call__(self, batch, *, needs=frozenset(), temperature=1.0, actor=True):
            from framework.batch import Outputs, Scores

            values = flat("new_values")
            return Outputs(flat("new_logp"), values=values) if actor else Scores(values)

    engine = Engine(Solo(0, 1, 0, torch.device("cpu")))
    items = both.objective(1)(engine, Batch())
    assert float(items.total() / 5) == pytest.approx(case["expected"]["total_pg_plus_vf"], abs=1e-12)
    alone = both.objective(0)(engine, Batch())
    assert float(alone.total() / 5) == pytest.approx(0.1 * case["expected"]["value_token_mean"], abs=1e-12)
    assert both.objective(0) is both.objective(0)
    assert both.objective(1) is both.objective(5)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
def test_the_critic_can_warm_up_alone(tiny_model_dir, name):
    for moved in workers.run(2, warmed_up, tiny_model_dir, name):
        assert moved == [(False, True), (True, True)]


def warmed_up(world, directory, name):
    """Whether (actor, critic) moved in each of two iterations, of which the first is a warm-up."""
    from framework.stages.online import Plan
    from framework.train.meter import Meter

    engine, rl = online_worlds.stage(
        world, directory, "ppo", name=name, critic_warmup=1, plan=Plan(prompts=6, sequences=6)
    )

    def weights():
        return {name: tensor.clone() for name, tensor in engine.weights()}

    meter, moved, before = Meter(world), [], weights()
    for step in range(2):
        online_worlds.take(engine, rl, meter, step, lr=1e-3)
        after = weights()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        moved.append(tuple(any(n.startswith(part) for n in changed) for part in ("policy.", "critic.")))
        before = after
    return moved


def test_how_well_the_critic_foresaw_what_came():
    """Values 0, 1 and returns 0, 2: variance 2, of which (0, 1) leaves 0.5; the third answer failed."""
    plain = Estimation(gae_lambda=1.0, whiten_advantages=False)
    e = answers([1, 1, 1], [0.0, 2.0, float("nan")], old_values=[0.0, 1.0, 50.0])
    _, metrics = method(estimation=plain).estimate(e)
    assert metrics["value/explained_variance"] == 0.75
    assert (metrics["value"], metrics["return"]) == (0.5, 1.0)
