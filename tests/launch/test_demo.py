"""The demonstration's bookkeeping: where it goes on, what it reads off a run, what the last page says."""

import json
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(LAUNCH))
    import demo

    monkeypatch.setattr(demo, "HOME", tmp_path)
    return demo


def test_an_unfinished_demonstration_is_gone_on_with_and_a_finished_one_is_not(demo, tmp_path):
    (tmp_path / "data").mkdir()
    assert demo._place() == tmp_path / "1"
    assert demo._place() == tmp_path / "1"
    (tmp_path / "1/summary.json").write_text("{}")
    assert demo._place() == tmp_path / "2"
    (tmp_path / "10").mkdir()
    assert demo._place() == tmp_path / "10"


def test_losses_before_and_after_speed_and_memory_are_read_off_the_record(demo, tmp_path):
    """Speeds 1, 2, 30, 50, 40: without the two warming up, the median is 40."""
    lines = [
        {"kind": "eval", "step": 0, "task/loss": 2.5, "general/loss": 1.3},
        *(
            {"kind": "train", "step": step, "tokens_per_s": speed, "peak_memory_bytes": step * 2**30}
            for step, speed in enumerate((1, 2, 30, 50, 40), start=1)
        ),
        {"kind": "event", "step": 5, "message": "resumed"},
        {"kind": "eval", "step": 5, "task/loss": 0.25, "general/loss": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert demo.training(tmp_path) == {
        "task_loss_before": 2.5,
        "task_loss": 0.25,
        "general_loss_before": 1.3,
        "general_loss": 1.5,
        "steps": 5,
        "general_loss_by_step": {"0": 1.3, "5": 1.5},
        "tokens_per_s": 40,
        "peak_memory_bytes": 5 * 2**30,
    }


def test_a_finished_training_is_not_started_again(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.subprocess, "Popen", lambda *_: pytest.fail("a training was started"))
    (tmp_path / "result.json").write_text('{"status": "done"}')
    assert demo.train(tmp_path, [], demo.Page()) == 0


@pytest.mark.parametrize("status", [0, 2, 3])
def test_the_trainings_status_is_the_demonstrations(demo, tmp_path, monkeypatch, status):
    (tmp_path / "result.json").write_text('{"status": "interrupted"}')
    started = demo.subprocess.Popen
    monkeypatch.setattr(
        demo.subprocess,
        "Popen",
        lambda _: started([sys.executable, "-c", f"raise SystemExit({status})"]),
    )
    assert demo.train(tmp_path, [], demo.Page()) == status


def test_what_measures_forgetting_is_apart_from_what_is_replayed(demo):
    import demo_replay

    assert not set(demo_replay.REPLAYED) & set(demo_replay.HELD_OUT)
    asked = {}
    for name in ("replay", "general"):
        rows = [json.loads(line) for line in (LAUNCH / f"demo_data/{name}.jsonl").read_text().splitlines()]
        asked[name] = {row["messages"][0]["content"] for row in rows}
        assert len(asked[name]) == len(rows)
        assert all(row["messages"][-1]["content"].strip() for row in rows)
    assert not asked["replay"] & asked["general"]
    assert not asked["replay"] & set(demo.TALK)
    for topic in demo_replay.HELD_OUT:
        assert not any(topic in question.split() for question in asked["replay"])


def test_the_last_page_says_every_number_and_answer(demo, tmp_path, capsys):
    def column(accuracy, said):
        sample = {"question": "Reverse this list of words: a, b", "right": "b, a", "said": said}
        return {
            "accuracy": accuracy,
            "task_loss": 0.125,
            "general_loss": 1.5,
            "task_sample": sample,
            "talk": [f"{said} {number}" for number in range(3)],
        }

    ran = {"tokens_per_s": 321.0, "peak_memory_bytes": 3 * 2**30}
    longer = {"steps": 40, "general_loss_by_step": {"0": 1.25, "20": 1.375, "40": 1.5}}
    shorter = {"steps": 20, "general_loss_by_step": {"0": 1.25, "20": 2.25}}
    measured = {
        "start": column(0.0, "first") | {"majority": 0.0, "few_shot": 0.03},
        "with replay": column(0.75, "kept") | ran | longer,
        "without replay": column(0.5, "[/lost]") | ran | shorter,
    }
    page = demo.Page()
    page.result(measured, demo.TALK, tmp_path, seconds=90)
    page.save(tmp_path / "summary.txt")
    shown = capsys.readouterr().out
    assert shown.strip() == (tmp_path / "summary.txt").read_text().strip()
    for text in (
        "75%",
        "50%",
        "0.125",
        "1.500",
        "321",
        "3.0",
        "kept 2",
        "[/lost] 1",
        "1.5 minutes",
        "3%",
        "the same 20 steps: 1.375 with replay, 2.250 without replay",
    ):
        assert text in shown, text
    for place in ("with-replay/model", "without-replay/report.html"):
        assert str(tmp_path / place) in shown.replace("\n", "")


def test_progress_that_is_piped_is_a_line_at_every_quarter(demo, capsys):
    page = demo.Page()
    with page.progress("questions", 8) as moved:
        for done in range(1, 9):
            moved(done, 8)
    assert capsys.readouterr().out.split("\n")[:-1] == [f"  questions: {n}/8" for n in (2, 4, 6, 8)]
