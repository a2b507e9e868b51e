"""Three tasks in a row by `launch/pipeline.py`, each rehearsing what those before left; killed on the way.

The world of letters: skills, then a cipher, then another. One chain, killed inside its second stage and again
while nothing of the third is there yet, and what comes out of it in the end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import characters
import pytest

from framework.cluster import directory
from framework.config import pipeline
from framework.data import buffer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHAIN = """
common:
  replay: fixed
  replay.carry: auto
  replay.fraction: 0.2
  steps: 200
  optim.lr: 1.0e-3
  checkpoint.every: 40
stages:
  skills:
    model.path: HERE/untrained
    data.train: [{path: HERE/learn.jsonl, licence: CC0}]
    steps: 600
    optim.lr: 3.0e-3
  cipher:
    model.path: ${stages.skills.model}
    data.train: [{path: HERE/cipher.jsonl}]
  second:
    model.path: ${stages.cipher.model}
    data.train: [{path: HERE/second.jsonl}]
  matrix:
    _target_: framework.config.chain.matrix
    max_new_tokens: 8
    models:
      start: HERE/untrained
      skills: ${stages.skills.model}
      cipher: ${stages.cipher.model}
      second: ${stages.second.model}
    tasks:
      skills: {path: HERE/skills.jsonl, score: EXACT, options: {field: completion}}
      cipher: {path: HERE/held.jsonl, score: EXACT, options: {field: completion}}
      second: {path: HERE/second_held.jsonl, score: EXACT, options: {field: completion}}
      facts: {path: HERE/facts.jsonl, learnt: skills}
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    place = tmp_path_factory.mktemp("letters")
    characters.write_data(place)
    characters.write_model(place / "untrained")
    (place / "conf/pipeline").mkdir(parents=True)
    text = CHAIN.replace("HERE", str(place)).replace("EXACT", "framework.rollout.rewards.exact")
    (place / "conf/pipeline/letters.yaml").write_text(text)
    return [
        f"--config-dir={place}/conf", "experiment=letters", f"run_dir={place}/runs",
        f"data.cache_dir={place}/cache",
        "launch.device=cpu", "launch.threads=1", "precision=fp32", "data.max_length=32", "data.packing=false",
        "batch.sequences=64", "batch.tokens_per_micro=2048", "tracker.console=none", "evaluate.samples=0",
        "retain=none", "optim.betas=[0.9,0.98]", "optim.weight_decay=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def places(command):
    return {step.name: step.directory for step in pipeline.check(command).steps}


def start(command):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch/pipeline.py"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_once(command, there):
    """Start, and kill every process of it as soon as `there` is."""
    process = start(command)
    deadline = time.monotonic() + 600
    try:
        while not there():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    for place in pipeline.check(command).steps:  # its orphans end by themselves
        assert directory.wait_for(place.directory, 60)


@pytest.fixture(scope="module")
def killed(command, places):
    """The buffers as two kills have left them: inside the cipher's training, and before the second's."""
    kill_once(command, lambda: any(places["cipher"].glob("checkpoints/step-*0")))
    inside = {name: (places[name] / "buffer/manifest.json").read_bytes() for name in ("skills", "cipher")}
    kill_once(command, lambda: (directory.result(places["cipher"]) or {}).get("status") == "done")
    assert not (places["second"] / "buffer").exists()
    return inside


@pytest.fixture(scope="module")
def finished(command, killed):
    process = start(command)
    told, _ = process.communicate(timeout=900)
    assert process.returncode == 0, told
    return told


def test_buffers_outlive_kills_inside_of_stages_and_between(places, killed, finished):
    for name, manifest in killed.items():
        assert (places[name] / "buffer/manifest.json").read_bytes() == manifest
    left = [buffer.read(places[name] / "buffer") for name in ("skills", "cipher", "second")]
    assert [[stratum.name for stratum in each.strata] for each in left] == [
        ["learn"], ["learn", "cipher"], ["learn", "cipher", "second"]]  # fmt: skip
    assert [each.parent for each in left] == [None, left[0].identity, left[1].identity]
    assert left[2].strata[0].licence == "CC0"


def lines(place, kind):
    found = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_the_share_is_exact_over_the_kill(places, finished):
    """Trained tokens of each step, as every example is counted once: replay owes less than an example."""
    for stage, carried in (("cipher", ["learn"]), ("second", ["learn", "cipher"])):
        steps = lines(places[stage], "train")
        assert [line["step"] for line in steps] == list(range(1, 201))
        owed = 0.0
        for line in steps:
            replayed = sum(line[f"trained_tokens/{name}"] for name in carried)
            owed += 0.2 * line["trained_tokens"] - replayed
            assert abs(owed) <= 6  # an answer has five tokens and an end
    said = [line["message"] for line in lines(places["skills"], "event")]
    assert any("nothing to rehearse" in message for message in said)


def test_the_chain_ends_with_what_was_learnt_kept_and_lost(places, finished):
    chain = json.loads((places["matrix"] / "matrix.json").read_text())
    whole = json.loads((places["matrix"].parent / "result.json").read_text())
    assert whole["stages"]["matrix"]["chain"] == chain
    scores = {name: task["scores"] for name, task in chain["tasks"].items()}
    for name, own in (("skills", 1), ("cipher", 2), ("second", 3)):
        assert max(scores[name][:own]) < 0.1, name  # nobody knows it before
        assert scores[name][own] > 0.9, name
        assert scores[name][3] > 0.7, name  # without rehearsal skills and the cipher are at 0
    means = chain["means"]["accuracy"]
    assert means["accuracy"] == pytest.approx(
        sum(scores[name][3] for name in ("skills", "cipher", "second")) / 3
    )
    assert means["backward_transfer"] == pytest.approx(
        (scores["skills"][3] - scores["skills"][1] + scores["cipher"][3] - scores["cipher"][2]) / 2
    )
    flips = chain["tasks"]["skills"]["flips"]
    assert flips["skills"]["gained"] - flips["skills"]["lost"] == pytest.approx(
        scores["skills"][3] - scores["skills"][1]
    )
    for name, rows in (("skills", "skills"), ("cipher", "held")):  # letter by letter, and in fp32
        told = characters.accuracy(places["second"] / "model", places["matrix"].parents[1] / f"{rows}.jsonl")
        assert scores[name][3] == pytest.approx(told, abs=0.05)
    facts = chain["tasks"]["facts"]  # of no score: the likelihood of their tokens
    assert facts["measure"] == "likelihood"
    assert facts["scores"][0] < 0.2 < facts["scores"][1]


def test_the_road_shows_the_matrix_and_the_console_told_it(places, finished):
    page = (places["matrix"].parent / "report.html").read_text()
    for text in ("Learnt, kept, lost", "Every task after every stage", "since learnt", "cipher, stage 2: "):
        assert text in page, text
    assert "mean accuracy at the end 0." in finished or "mean accuracy at the end 1." in finished
    assert "(BWT)" in finished
