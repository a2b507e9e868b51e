"""The same seed gives the same curve on one rank and on two, whole and sharded, and after a kill."""

import online_worlds
import pytest
import workers


def close(ours, theirs, tolerance=1e-4):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance, abs=tolerance)
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=tolerance, abs=tolerance)
    assert len(ours["rollouts"]) == len(theirs["rollouts"])
    for mine, other in zip(ours["rollouts"], theirs["rollouts"], strict=True):
        assert mine == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_one_rank_and_two_draw_the_same_curve(tiny_model_dir, kind):
    """Five steps: two iterations of two minibatches (or more) and the start of a third."""
    (alone,) = workers.run(1, online_worlds.curve, tiny_model_dir, kind, steps=5)
    assert len(alone["rollouts"]) >= 2
    assert alone["norm"][0] > 1e-3
    assert max(metrics["mismatch/max"] for metrics in alone["rollouts"]) < 1e-4  # nats, both in fp32
    for name in ("ddp", "fsdp", "zero3"):
        both = workers.run(2, online_worlds.curve, tiny_model_dir, kind, steps=5, name=name)
        assert both[0] == both[1]
        close(both[0], alone)


def test_a_prompt_read_once_for_all_its_answers_changes_nothing(tiny_model_dir):
    (apart,) = workers.run(1, online_worlds.curve, tiny_model_dir, "grpo", steps=3)
    (shared,) = workers.run(1, online_worlds.curve, tiny_model_dir, "grpo", steps=3, sharing=True)
    close(shared, apart)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_resumed_iteration_repeats_the_same_numbers(tiny_model_dir, kind):
    ((straight, again),) = workers.run(1, online_worlds.resumed, tiny_model_dir, kind)
    assert len(straight) >= 2
    assert straight == again
