"""Distillation goes on bit for bit from a checkpoint, with the teacher it began with and no other."""

import shutil

import pytest
import torch
import workers
from safetensors.torch import load_file, save_file
from test_other_strategy import BEFORE, STEPS, command, joined, train

__all__ = ["command"]  # a fixture

LORA = ["precision=bf16", "adapter=lora", "adapter.dropout=0.1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_untied_dir):
    return shutil.copytree(tiny_untied_dir, tmp_path_factory.mktemp("taught") / "teacher")


OWN = ["stage.top_k=null", "stage.own_share=0.5", "rollout.max_new_tokens=8"]
CELLS = [(strategy, ["stage.top_k=16"]) for strategy in ("ddp", "fsdp", "zero3")] + [("fsdp", OWN)]


@pytest.mark.parametrize(("strategy", "how"), CELLS, ids=["ddp", "fsdp", "zero3", "own answers"])
def test_the_same_strategy_and_size_go_on_bit_for_bit(strategy, how, command, teacher, tmp_path):
    taught = ["stage=distill", f"stage.teacher={teacher}", *how, f"strategy={strategy}"]
    arguments = [*command, *LORA, *taught]
    whole = workers.run(2, train, [*arguments, f"run_dir={tmp_path}/a"], start=0, stop=STEPS)
    there = [*arguments, f"run_dir={tmp_path}/b"]
    first = workers.run(2, train, there, start=0, stop=BEFORE)
    second = workers.run(2, train, there, start=BEFORE, stop=STEPS)
    losses = first[0]["losses"] + second[0]["losses"]
    assert [loss.hex() for loss in losses] == [loss.hex() for loss in whole[0]["losses"]]
    assert first[0]["rows"] + second[0]["rows"] == whole[0]["rows"]
    end, expected = joined(second, "saved"), joined(whole, "saved")
    assert all(torch.equal(end[key], expected[key]) for key in expected)


def test_a_teacher_of_other_weights_is_refused(command, teacher, tmp_path):
    """At the same path, with one number changed."""
    arguments = [*command, "stage=distill", f"stage.teacher={teacher}", f"run_dir={tmp_path}"]
    workers.run(1, train, arguments, start=0, stop=1)
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(workers.WorkerError, match="belongs to another run: teacher was"):
        workers.run(1, train, arguments, start=1, stop=2)
