"""The page of a sweep: the best with its command, all in order, a picture of each, what failed and why."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import Page

from framework.track import coordinates, sweep

ROOT = Path(__file__).parents[2]
MIN = {"metric": None, "goal": "min"}


@pytest.fixture
def place(tmp_path):
    return tmp_path / "sweep-1234"


def job(place, number, settings, *, status="done", result=None, **more):
    where = place / f"run-{number}"
    where.mkdir(parents=True)
    if result is not None:
        (where / "result.json").write_text(json.dumps({"status": "done", **result}))
    overrides = ["model.path=<b>m</b>", *(f"{key}={value}" for key, value in settings.items())]
    return {
        "number": number,
        "status": status,
        "run_dir": str(where),
        "overrides": overrides,
        "varied": settings,
        "command": "python launch/train.py " + " ".join(overrides),
        "seconds": 60.0,
        **more,
    }


def losses(task, general):
    metrics = {"task/loss": task, "general/loss": general}
    return {"metrics": metrics, "objective": task, "best": {"metric": "task/loss", "value": task}}


@pytest.fixture
def jobs(place):
    """By task loss: 2, 1, 0, then one that diverged. By both: 3 is behind 1 in both."""
    return [
        job(place, 0, {"optim.lr": "1e-5", "adapter": "full"}, result=losses(3.0, 1.0)),
        job(place, 1, {"optim.lr": "1e-4", "adapter": "full"}, result=losses(1.5, 2.0)),
        job(place, 2, {"optim.lr": "1e-3", "adapter": "lora"}, result=losses(1.25, 4.0)),
        job(place, 3, {"optim.lr": "1e-2", "adapter": "lora"}, result=losses(1.75, 2.5)),
        job(place, 4, {"optim.lr": "1", "adapter": "full"}, result=losses(float("nan"), 9.0)),
        job(
            place,
            5,
            {"optim.lr": "2", "adapter": "lora"},
            status="failed",
            error="Traceback\n  ...\nRuntimeError: <b>out of memory</b>",
            log="jobs/5.log",
        ),
        job(place, 6, {"optim.lr": "3", "adapter": "lora"}, status="pruned"),
    ]


def test_one_objective_has_a_best_with_its_command_and_a_table_in_order(place, jobs):
    described = {"objectives": [MIN], "status": "failed", "command": "python launch/train.py -m a=1,2"}
    text = sweep.build(place, described, jobs).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert not any("http" in value for _, value in page.attributes if value)
    assert "<b>m</b>" not in text
    assert "<h2>job 2: task/loss 1.25</h2>" in text
    best = text[text.index("The best") : text.index("Settings and results")]
    assert "python launch/train.py model.path=&lt;b&gt;m&lt;/b&gt; optim.lr=1e-3 adapter=lora</pre>" in best
    table = text[text.index("All that finished") : text.index("What did not")]
    assert re.findall(r"job (\d)", table) == ["2", "1", "3", "0", "4"]
    rest = text[text.index("What did not") : text.index("This sweep")]
    assert "RuntimeError: &lt;b&gt;out of memory&lt;/b&gt;" in rest
    assert "Traceback" not in rest
    assert "jobs/5.log" in rest
    assert "pruned" in rest
    assert "python launch/train.py -m a=1,2" in text
    assert text.count("<path class=") == 4  # a line each for what has a finite result
    assert text.count('<path class="best"') == 1


def test_goal_max_turns_the_order_and_a_metric_may_be_named(place, jobs):
    described = {"objectives": [{"metric": "general/loss", "goal": "max"}]}
    text = sweep.build(place, described, jobs).read_text()
    table = text[text.index("All that finished") : text.index("What did not")]
    assert re.findall(r"job (\d)", table) == ["4", "2", "3", "1", "0"]
    assert "<h2>job 4: general/loss 9</h2>" in text


def test_two_objectives_make_a_front(place, jobs):
    described = {"objectives": [{"metric": f"{name}/loss", "goal": "min"} for name in ("task", "general")]}
    text = sweep.build(place, described, jobs).read_text()
    front = text[text.index("the Pareto front") : text.index("All that finished")]
    assert re.findall(r"<h2>job (\d):", front) == ["2", "1", "0"]
    assert text.count('<circle class="best"') == 3
    assert text.count('<circle class="run"') == 1  # job 3; what diverged has no place


def test_numbers_and_words_stand_on_their_axes():
    """1e-5 and 1e-3 are the ends of a logarithmic axis, 1e-4 its middle; words stand in even steps."""
    lines = [
        coordinates.Line("a", [1e-5, "full", 1.0], 1.0, best=True),
        coordinates.Line("b", [1e-4, "lora", 2.0], 0.5),
        coordinates.Line("c", [1e-3, "lora", 3.0], 0.0),
    ]
    text = coordinates.parallel("t", ["lr", "adapter", "loss"], lines)
    ways = {
        name: [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", way)]
        for way, name in re.findall(r'd="(M[^"]*)"><title>(\w)', text)
    }
    low, high = coordinates.HEIGHT - coordinates.BOTTOM, coordinates.TOP
    middle, quarter = (low + high) / 2, (low - high) / 4
    assert ways["a"] == pytest.approx([low, low - quarter, low], abs=0.06)
    assert ways["b"] == pytest.approx([middle, high + quarter, middle], abs=0.06)
    assert ways["c"] == pytest.approx([high, high + quarter, high], abs=0.06)
    assert text.rindex('class="best"') > text.rindex('class="run"')  # drawn last, on top


def test_a_page_of_nothing_yet_and_the_command_that_makes_it(place, jobs):
    (place / "jobs").mkdir()
    (place / "sweep.json").write_text(json.dumps({"status": "running"}))
    for found in jobs:
        (place / "jobs" / f"{found['number']}.json").write_text(json.dumps(found))
    command = [sys.executable, str(ROOT / "launch" / "report.py")]
    done = subprocess.run([*command, str(place)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{place}/report.html\n")
    assert "job 2: task/loss 1.25" in (place / "report.html").read_text()
    refused = subprocess.run([*command, str(place.parent)], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: {place.parent}: found no sweep, pipeline or run; expected the directory of one; "
        f"type one of {place}\n"
    )
    assert "running" in sweep.render(place, {"status": "running"}, [])
