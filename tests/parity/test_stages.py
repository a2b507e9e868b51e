"""All stages that learn from judgements or a teacher, on 1, 2 and 4 ranks, under every strategy: one curve.

Everything goes through the composed configuration: tokenising, packing with shared prompts, references,
rollouts, rewards in processes of their own, couplings over the world.
"""

import pytest
import stage_recipes

AT_FOUR = {"reward": "ddp", "dpo": "zero3", "kto": "fsdp", "ppo": "fsdp", "grpo": "ddp"}
AT_FOUR |= {"distill": "fsdp", "gkd": "ddp", "on_policy": "zero3"}
CELLS = [
    pytest.param(kind, size, strategy, marks=pytest.mark.slow)
    if size == 4 and AT_FOUR[kind] != strategy
    else (kind, size, strategy)
    for kind in stage_recipes.STAGES
    for size in (2, 4)
    for strategy in ("ddp", "fsdp", "zero3")
    if size > 1  # one process trains replicated under all of them: the curve that the others are held to
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir):
    return stage_recipes.write(tmp_path_factory.mktemp("stages"), tiny_model_dir)


@pytest.fixture(scope="module")
def alone(place, tiny_model_dir):
    """Runs of one process, made once for each stage and its changes."""
    made = {}

    def get(kind, **changes):
        key = (kind, *sorted(changes.items()))
        if key not in made:
            made[key] = stage_recipes.run(1, kind, place, tiny_model_dir, **changes)
        return made[key]

    return get


def same_curve(found, expected):
    """Losses and norms to 1e-4, whole lines and rollouts likewise, answers token by token.

    Absolutely 1e-7 for a loss, as advantages of mean 0 cancel down to fp32's rounding; 1e-6 nats for metrics
    that are such rounding themselves (`mismatch`).
    """
    assert found["tokens"] == expected["tokens"]
    for name in ("loss", "grad_norm"):
        ours, theirs = ([line[name] for line in run["lines"]] for run in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7), name
    for name in ("lines", "rollouts"):
        assert len(found[name]) == len(expected[name])
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("kind", "size", "strategy"), CELLS)
def test_every_stage_draws_one_curve(kind, size, strategy, place, alone, tiny_model_dir):
    same_curve(stage_recipes.run(size, kind, place, tiny_model_dir, strategy=strategy), alone(kind))


@pytest.mark.parametrize("kind", stage_recipes.STAGES)
def test_the_curves_are_worth_comparing(kind, alone):
    """Micro-batches are cut, something is learnt, answers were trained on more than once."""
    run = alone(kind)
    first, last = run["lines"][0], run["lines"][-1]
    assert max(run["micros"]) > 2
    assert all(line["grad_norm"] > 1e-3 for line in run["lines"])
    if kind in ("ppo", "grpo", "on_policy"):
        assert len(run["rollouts"]) == 3
        assert len({tuple(ids) for ids in map(tuple, run["tokens"])}) == 3
        assert max(line["approx_kl"] for line in run["lines"]) > 1e-4
        assert all(rollout["reward_std"] > 0.1 for rollout in run["rollouts"])
    else:
        fallen = 0.9 if kind == "gkd" else 0.8  # which is asked something else in every step: its own answers
        assert last["loss"] < fallen * first["loss"]
    if kind == "kto":
        assert max(line["baseline"] for line in run["lines"]) > 0


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_an_adapter_that_is_its_own_reference(kind, strategy, place, alone, tiny_model_dir):
    """Two ranks with LoRA, the start model being the policy without it."""
    changes = {"adapter": "lora", "optim__lr": 1e-2, "stage__reference": "adapter"}
    found = stage_recipes.run(2, kind, place, tiny_model_dir, strategy=strategy, **changes)
    same_curve(found, alone(kind, **changes))


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_an_adapter_switched_off_is_the_frozen_start_model(kind, alone):
    changes = {"adapter": "lora", "optim__lr": 1e-2}
    off, frozen = (alone(kind, **changes, stage__reference=where) for where in ("adapter", "frozen"))
    same_curve(off, frozen)


def test_a_reference_that_was_computed_once_is_the_frozen_one(alone):
    same_curve(alone("dpo", stage__reference="cached"), alone("dpo"))


def test_a_critic_begins_with_or_without_the_opinion_of_its_reward_model(alone):
    kept, zeros = alone("ppo"), alone("ppo", stage__critic_head="zeros")
    assert kept["tokens"][0] == zeros["tokens"][0]
    assert kept["rollouts"][0]["value"] != 0
    assert zeros["rollouts"][0]["value"] == 0
    assert zeros["rollouts"][-1]["value"] != 0
