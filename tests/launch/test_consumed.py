"""launch/consumed.py on a run with replay: its lines, its digest, and what it refuses."""

import json
import shutil
from pathlib import Path

import ledger
import pytest
from launched import forked

from framework.config import record
from framework.config.compose import compose
from framework.data import buffer

SCRIPT = Path(__file__).resolve().parents[2] / "launch/consumed.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_dir):
    """A run that replays under a budget, as launch/train.py leaves it."""
    place = ledger.files(tmp_path_factory.mktemp("consumed"), tiny_model_dir)
    arguments = ledger.line("sft", place, tiny_model_dir, place / "run")
    ledger.run(1, arguments)
    (place / "run/config.yaml").write_text(record.saved(compose(arguments)))
    return place


def consumed(*arguments, cwd):
    """(exit status, lines, what was said) of the command."""
    done = forked(SCRIPT, *map(str, arguments), cwd=cwd)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_a_line_for_every_example_and_a_digest(trained, tmp_path):
    status, lines, said = consumed(trained / "run", cwd=tmp_path)
    assert status == 0
    assert len(lines) == ledger.STEPS * ledger.SEQUENCES
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert {line["source"] for line in lines} == {"task", "general", "chat"}
    one = next(line for line in lines if line["source"] == "task")
    row = (trained / "task.jsonl").read_text().splitlines()[int(one["place"].rpartition(":")[2]) - 1]
    assert one["row"] == buffer.row_hash(json.loads(row))
    again = consumed(trained / "run", "--out", "rows.jsonl", cwd=tmp_path)
    assert again == (0, [], said)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == lines
    assert "64 examples in 8 steps, digest " in said


def test_a_row_is_found_by_the_hash_that_excludes_it(trained, tmp_path):
    _, lines, _ = consumed(trained / "run", cwd=tmp_path)
    wanted = lines[5]["row"]
    status, found, said = consumed(trained / "run", "--row", wanted, cwd=tmp_path)
    assert status == 0
    assert found == [line for line in lines if line["row"] == wanted]
    assert f"{len(found)} of 64 examples" in said
    assert consumed(trained / "run", "--row", "0" * 32, cwd=tmp_path)[1] == []


def test_rows_of_the_buffer_that_a_run_left_have_the_same_hashes(trained, tmp_path):
    _, lines, _ = consumed(trained / "run", cwd=tmp_path)
    left = buffer.read(trained / "run/buffer")
    kept = [row for stratum in left.strata for row in buffer.lines(trained / "run/buffer", stratum)]
    places = {row["from"]: row["row"] for row in kept}
    both = [line for line in lines if line["place"].rpartition("/")[2] in places]
    assert len(both) > len(lines) / 2
    assert all(line["row"] == places[line["place"].rpartition("/")[2]] for line in both)


def test_a_place_that_cannot_be_written_is_refused(trained, tmp_path):
    status, lines, said = consumed(trained / "run", "--out", "nowhere/rows.jsonl", cwd=tmp_path)
    assert (status, lines) == (2, [])
    assert said.splitlines()[-1].startswith("error: nowhere/rows.jsonl: No such file or directory")


def test_a_changed_file_is_refused_by_name(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    text = (trained / "chat.jsonl").read_text()
    (tmp_path / "chat.jsonl").write_text(text.replace("two", "six"))
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace(f"{trained}/chat.jsonl", f"{tmp_path}/chat.jsonl"))
    status, lines, said = consumed(tmp_path / "run", cwd=tmp_path)
    assert (status, lines) == (2, [])
    assert "data.chat" in said


def test_a_run_without_a_checkpoint_is_refused(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    status, lines, said = consumed(tmp_path / "run", cwd=tmp_path)
    assert (status, lines) == (2, [])
    assert "no checkpoint" in said
