"""Files to measure forgetting on: no row of them is trained on, and a run takes them as they are printed."""

import json
import shlex

import pytest
import talkers

from framework.config import build, measuring, selfmade
from framework.config.compose import compose
from framework.data.leaks import normalised
from framework.errors import DataError


def written(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_rows_of_a_file_measure_and_its_others_are_left(tmp_path):
    texts = [f"text number {n}" for n in range(20)]
    mine = written(tmp_path / "mine.jsonl", texts)
    trained = written(tmp_path / "trained.jsonl", ["Text number 3!", "TEXT number 4"])
    (stratum,) = measuring.from_files({"prose": mine}, tmp_path / "out", rows=5, against=[trained])
    measured, rest = texts_of(stratum.path), texts_of(stratum.rest)
    assert (stratum.name, stratum.rows, len(measured)) == ("prose", 5, 5)
    assert sorted(measured + rest) == sorted(texts)
    assert {"text number 3", "text number 4"} <= set(rest)
    with pytest.raises(DataError, match=r"mine.jsonl: all of its 20 rows are trained on"):
        measuring.from_files({"prose": mine}, tmp_path / "out", rows=5, against=[mine])


def test_a_start_model_writes_probes_that_its_replay_does_not_have(tmp_path):
    """With what is printed a run measures on them, and replays text of the same model beside them."""
    model = talkers.write(tmp_path / "chat", chat=True)
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "cba"}]
    (tmp_path / "task.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    settings = [
        f"model.path={model}",
        f"data.train=[{{path: {tmp_path}/task.jsonl}}]",
        f"data.cache_dir={tmp_path}/cache",
        "data.max_length=256",
        "synthesis.max_new_tokens=40",
        "synthesis.min_new_tokens=2",
        "precision=fp32",
        "launch.device=cpu",
        "steps=2",
    ]
    strata = measuring.from_model(compose(settings), tmp_path / "out", rows=3, against=[])
    assert {stratum.name for stratum in strata} == set(measuring.STRATA)
    (typed,) = shlex.split(measuring.typed(strata))
    run = compose([*settings, typed, "replay=synthesised", "synthesis.rows=18"])
    prepared = build.prepare(run)
    assert {stratum.name for stratum in prepared.probes.strata} == set(measuring.STRATA)
    replayed = selfmade.texts([selfmade.Source(path=run._rows["self:"])])
    probed = selfmade.texts([selfmade.Source(path=str(stratum.path)) for stratum in strata])
    assert len(replayed) == 18
    assert not replayed & probed
    assert normalised("abc\ncba") not in probed
