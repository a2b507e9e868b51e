"""The record of a run: what a line is, what a resume cuts, what a failure costs."""

import errno
import json
import math
import os

import pytest

from framework.track.fanout import Fanout
from framework.track.jsonl import Jsonl, read


class Recorder:
    def __init__(self, fails_on=None):
        self.seen, self.fails_on = [], fails_on

    def log(self, kind, metrics, *, step):
        if kind == self.fails_on:
            raise RuntimeError("boom")
        self.seen.append((kind, step))

    def artifact(self, path, *, kind):
        self.seen.append((kind, path))

    def close(self, status):
        self.seen.append(status)


def test_a_failing_tracker_is_named_once_and_dropped():
    """The one before and the one behind it get everything; the failed one is not even closed."""
    before, bad, behind, said = Recorder(), Recorder(fails_on="eval"), Recorder(), []
    tracker = Fanout([before, bad, behind], say=said.append)
    tracker.log("train", {}, step=1)
    tracker.log("eval", {}, step=1)
    tracker.log("eval", {}, step=2)
    tracker.artifact("model", kind="model")
    tracker.close("done")
    expected = [("train", 1), ("eval", 1), ("eval", 2), ("model", "model"), "done"]
    assert before.seen == behind.seen == expected
    assert bad.seen == [("train", 1)]
    assert said == ["Recorder records no more from here on; the run goes on: RuntimeError('boom')"]


def test_a_fanout_of_nothing_is_silent(capfd):
    tracker = Fanout([])
    tracker.log("train", {"loss": 1.0}, step=1)
    tracker.close("done")
    assert capfd.readouterr() == ("", "")


def test_every_line_is_strict_json(tmp_path):
    """NaN and infinities become strings that float() reads back, nested ones too."""
    record = Jsonl(tmp_path / "m.jsonl")
    record.log("train", {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-5, "word": "Ω\n"}, step=1)
    record.log("samples", {"rows": [{"prompt": "p", "score": -math.inf}]}, step=1)
    record.close("done")

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "m.jsonl").read_text()
    first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert first == {
        "kind": "train", "step": 1, "loss": "NaN", "grad_norm": "Infinity", "lr": 1e-05, "word": "Ω\n",
    }  # fmt: skip
    assert second["rows"][0]["score"] == "-Infinity"
    assert math.isnan(float(first["loss"]))
    assert float(second["rows"][0]["score"]) == -math.inf


def test_a_line_is_in_the_file_at_once(tmp_path):
    """Whoever follows the file sees a step as soon as it is logged, and so does a run that is killed."""
    record = Jsonl(tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        record.log("train", {}, step=step)
        assert [line["step"] for line in read(tmp_path / "m.jsonl")][-1] == step


def test_a_resumed_run_has_no_step_twice(tmp_path):
    """Steps 1..5 and half a line of 6 were written, the checkpoint is of step 3: 4 and 5 come again."""
    path = tmp_path / "m.jsonl"
    record = Jsonl(path)
    for step in range(1, 6):
        record.log("train", {"loss": step + 0.1}, step=step)
    record.log("eval", {"task/loss": 1.0}, step=3)
    record.log("event", {"message": "late"}, step=5)
    with open(path, "a") as file:
        file.write('{"kind": "train", "st')
    record = Jsonl(path, resume_step=3)
    record.log("train", {"loss": 4.2}, step=4)
    record.close("done")
    lines = list(read(path))
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines if line["kind"] == "train"] == [1.1, 2.1, 3.1, 4.2]
    assert [(line["kind"], line["step"]) for line in lines if line["kind"] != "train"] == [
        ("eval", 3),
        ("event", 3),
    ]
    assert "resumed from step 3" in lines[-2]["message"]
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_a_fresh_start_keeps_the_record_that_was_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    Jsonl(path).log("train", {}, step=1)
    Jsonl(path).log("train", {}, step=2)
    assert [line["step"] for line in read(path)] == [2]
    assert [line["step"] for line in read(tmp_path / "metrics.previous.jsonl")] == [1]


def test_a_rollout_after_the_checkpoint_is_written_again_and_an_evaluation_before_it_is_not(tmp_path):
    """Step 4: trained, evaluated with answers, saved; then the next iteration began, and was killed."""
    path = tmp_path / "m.jsonl"
    record = Jsonl(path)
    kinds = [(0, "rollout"), (0, "samples"), (4, "train"), (4, "samples"), (4, "eval")]
    for step, kind in [*kinds, (4, "rollout"), (4, "samples"), (5, "train")]:
        record.log(kind, {}, step=step)
    record.close("failed")
    Jsonl(path, resume_step=4).close("done")
    assert [(line["step"], line["kind"]) for line in read(path)] == [*kinds, (4, "event")]


def test_a_resume_without_a_record_starts_one(tmp_path):
    Jsonl(tmp_path / "run" / "m.jsonl", resume_step=7)
    assert [line["step"] for line in read(tmp_path / "run" / "m.jsonl")] == [7]


@pytest.mark.parametrize("taken", [0, 11])
def test_a_full_disk_delays_lines_but_loses_none(tmp_path, monkeypatch, taken):
    """The disk takes `taken` bytes of a line, then nothing, then everything: no line lost or torn."""
    said = []
    record = Jsonl(tmp_path / "m.jsonl", say=said.append)
    record.log("train", {}, step=1)
    write, room = os.write, [taken]

    def full(descriptor, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count, room[0] = write(descriptor, data[: room[0]]), 0
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        record.log("train", {}, step=2)
        record.log("train", {}, step=3)
    assert [line["step"] for line in read(tmp_path / "m.jsonl")] == [1]
    record.log("train", {}, step=4)
    assert [line["step"] for line in read(tmp_path / "m.jsonl")] == [1, 2, 3, 4]
    assert len(said) == 1
    assert "No space left on device" in said[0]
