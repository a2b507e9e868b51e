"""Checkpoints and models of runs in 8-bit floats are those of any run: to go on from with them or without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import joined
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("torchao")

ROOT = Path(__file__).resolve().parents[2]
FP8 = ["model.fp8=tensorwise", "model.fp8_emulate=true"]


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_model_dir):
    place = tmp_path_factory.mktemp("fp8")
    rows = [
        {"prompt": f"one two {'three ' * (i % 7)}", "completion": f"four {'five ' * (i * 5 % 11)}"}
        for i in range(40)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"model.path={tiny_model_dir}",
        f"data.train=[{{path: {place}/rows.jsonl}}]",
        f"data.cache_dir={place}/cache",
        "data.max_length=64",
        "batch.sequences=8",
        "batch.tokens_per_micro=96",
        "precision=bf16",
        "optim.lr=1e-2",
        "schedule=constant",
        "strategy=fsdp",
        "launch.nproc=2",
        "launch.device=cpu",
        "steps=4",
        "checkpoint.every=2",
        "checkpoint.keep=9",
        "tracker.console=none",
        "evaluate.retention=[]",
    ]


def launched(command, where, *arguments):
    line = [sys.executable, "launch/train.py", *command, f"run_dir={where}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def lines(where, kind):
    found = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def losses(where):
    return {line["step"]: line["loss"] for line in lines(where, "train")}


def shards(where, step):
    """What is kept of masters and moments, by file and name; headers differ by the save's id."""
    files = (where / f"checkpoints/step-{step:06}").glob("shard-*")
    return {(file.name, name): values for file in files for name, values in load_file(file).items()}


def test_a_run_goes_on_with_and_without(command, tmp_path):
    whole, plain = tmp_path / "whole", tmp_path / "plain"
    for where, how in ((whole, FP8), (plain, [])):
        joined.run(2, [*command, f"run_dir={where}", *how])
    assert next(line["message"] for line in lines(whole, "event")).startswith(
        "fp8 (tensorwise, emulated): 12 "
    )
    assert losses(whole)[4] < losses(whole)[1]
    assert losses(whole)[1] != losses(plain)[1]
    assert losses(whole)[1] == pytest.approx(losses(plain)[1], rel=0.02)

    # files are alike, and the model is a plain one
    names = [sorted(path.name for path in (where / "model").iterdir()) for where in (whole, plain)]
    assert names[0] == names[1]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(where / "model") for where in (whole, plain))
    assert list(ours.state_dict()) == list(theirs.state_dict())

    # with it: to the bit; without after a start with it, and with it after a start without
    again, off, on = tmp_path / "again", tmp_path / "off", tmp_path / "on"
    for where, start, how in ((again, whole, FP8), (off, whole, []), (on, plain, FP8)):
        joined.run(2, [*command, f"run_dir={where}", f"resume={start}/checkpoints/step-000002", *how])
    assert [losses(again)[step] for step in (3, 4)] == [losses(whole)[step] for step in (3, 4)]
    ours, theirs = shards(again, 4), shards(whole, 4)
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[key], values) for key, values in theirs.items())
    for other, start in ((off, whole), (on, plain)):
        assert losses(other)[3] != losses(start)[3]
        assert losses(other)[3] == pytest.approx(losses(start)[3], rel=0.02)


def test_refusals_end_with_status_2(command, tmp_path):
    for arguments, told in (
        (["model.fp8=tensorwise"], "type model.fp8_emulate=true or model.fp8=null"),
        ([*FP8, "adapter=lora"], "type adapter=full or model.fp8=null"),
    ):
        ended = launched(command, tmp_path / "run", *arguments)
        assert ended.returncode == 2
        assert told in ended.stderr
