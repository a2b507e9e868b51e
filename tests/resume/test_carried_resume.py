"""A stage that rehearses what an earlier one left, killed and started again: bit for bit, or not at all."""

import json
import shutil

import pytest

from framework.config.compose import compose
from framework.config.work import work
from framework.data import buffer
from framework.errors import CheckpointError, SapwoodError

STEPS, KILLED = 8, 4


def rows(kind, count):
    return [
        {"prompt": f"{kind} {'one ' * (i % 5)}{i}", "completion": f" {'two ' * (i * 3 % 7)}{i}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_model_dir):
    """Trains stage `name` from the model of `start` in this process."""
    place = tmp_path_factory.mktemp("carried")

    def trained(name, start, *more):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(name, 60)))
        return work(compose([
            f"model.path={place / start / 'model' if start else tiny_model_dir}",
            f"data.train=[{{path: {place}/{name}.jsonl}}]", f"run_dir={place}/{name}",
            f"data.cache_dir={place}/cache", "data.max_length=128", "batch.sequences=8",
            "batch.tokens_per_micro=256", "precision=fp32", "launch.device=cpu", "retain=none",
            f"steps={STEPS}",
            f"checkpoint.every={KILLED}", "checkpoint.keep=2", "tracker.report=false", "tracker.console=none",
            "evaluate.samples=0", "replay=fixed", "replay.carry=auto", "replay.fraction=0.3", *more,
        ]))  # fmt: skip

    assert trained("first", None) == 0
    assert trained("second", "first") == 0
    trained.at = place
    return trained


def lines(run_dir):
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "tokens_per_s", "tflops", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in times} for line in found if line["kind"] == "train"]


def die(run_dir):
    """As if the run had been killed after its first checkpoint."""
    shutil.rmtree(run_dir / f"checkpoints/step-{STEPS:06d}")
    shutil.rmtree(run_dir / "model")
    (run_dir / "result.json").unlink()


def test_it_goes_on_bit_for_bit_with_the_same_buffer(train):
    whole, manifest = lines(train.at / "second"), (train.at / "second/buffer/manifest.json").read_bytes()
    assert sum(line["trained_tokens/first"] for line in whole) > 0
    die(train.at / "second")
    assert train("second", "first") == 0
    assert lines(train.at / "second") == whole
    assert (train.at / "second/buffer/manifest.json").read_bytes() == manifest


def test_with_another_buffer_it_is_another_run(train):
    """A row that was deleted from what is rehearsed: the checkpoint is of other data and says so."""
    left = train.at / "first/buffer"
    (stratum,) = buffer.read(left).strata
    row = buffer.lines(left, stratum)[0]["row"]
    die(train.at / "second")
    with pytest.raises((SapwoodError, CheckpointError), match=r"buffer|data"):
        train("second", "first", f"replay.excluded=['{row}']")
