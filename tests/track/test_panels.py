"""What metrics are called on a dashboard: each known one has a section and a name of its own."""

from framework.track import panels

TRAIN = """loss loss/task loss/replay tokens tokens/task tokens/replay trained_tokens trained_tokens/task
trained_tokens/replay nll replay/loss replay_tokens value/loss value/error value/mean value/clipped log_odds
sequences/task replay_sequences replay_tokens/chat loss_share/task trained_share/task
loss/dpo grad_norm lr skipped seconds tokens_per_s mfu tflops packing_efficiency sequences micros
peak_memory_bytes data_index epoch kl approx_kl ratio clip/low clip/high clip/dual entropy gate
rewards/chosen rewards/rejected rewards/margin rewards/accuracy rewards/mean logps/chosen logps/accuracy
baseline"""
ROLLOUT = """reward reward_std reward/exact reward_failed_share score advantage advantage_std kl kl_k3
kl_coefficient kl_per_answer entropy length length_max finished_share sequences tokens counted_share
mismatch/mean mismatch/kl seconds/generate seconds/judge value return value/explained_variance
iteration data_index"""
EVAL = "task/loss task/units task/perplexity skills/accuracy"
RETAIN = "chat/loss chat/relative chat/relative_high chat/kl chat/kl_high replay/share"
LINES = {"train": TRAIN, "rollout": ROLLOUT, "eval": EVAL, "retain": RETAIN}


def placed():
    return {
        (kind, key): name
        for kind, keys in LINES.items()
        for key, name in zip(keys.split(), panels.placed(kind, dict.fromkeys(keys.split(), 1.0)), strict=True)
    }


def test_no_two_metrics_of_a_run_share_a_name():
    names = list(placed().values())
    assert len(set(names)) == len(names)


def test_every_name_stands_in_a_section_that_is_defined():
    assert {name.partition("/")[0] for name in placed().values()} <= set(panels.SECTIONS)


def test_what_stands_where():
    found = placed()
    assert found["train", "loss"] == "loss/train"
    assert found["train", "loss/task"] == "sources/loss/task"
    assert found["train", "loss/dpo"] == "loss/dpo"  # a part of the loss, not a source: it has no tokens
    assert found["train", "tokens/replay"] == "sources/tokens/replay"
    assert found["train", "sequences/task"] == "sources/sequences/task"
    assert found["train", "loss_share/task"] == "sources/loss_share/task"
    assert found["train", "replay_tokens/chat"] == "sources/replay_tokens/chat"
    assert found["train", "rewards/margin"] == "reward/margin"
    assert found["train", "mfu"] == "throughput/mfu"
    assert found["train", "tflops"] == "throughput/tflops"
    assert found["train", "peak_memory_bytes"] == "memory/peak_memory_bytes"
    assert found["rollout", "reward"] == "reward/reward"
    assert found["rollout", "kl"] == "kl/rollout"
    assert found["eval", "task/loss"] == "held-out/task/loss"
    assert found["retain", "chat/relative"] == "retention/chat/relative"


def test_only_numbers_are_drawn():
    assert panels.placed("train", {"loss": 1.0, "note": "words", "parts": [1]}) == {"loss/train": 1.0}


def test_an_unknown_metric_of_a_users_loss_has_a_place():
    assert panels.placed("train", {"mine": 1.0}) == {"train/mine": 1.0}
    assert panels.placed("other", {"mine": 1.0}) == {"other/mine": 1.0}
