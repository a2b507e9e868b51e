"""report.html: one file that needs no other, shows the numbers, and lets no text become markup."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from framework.track import chart
from framework.track.jsonl import Jsonl
from framework.track.report import Report, build

ROOT = Path(__file__).parents[2]
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "body" in self.stack and "svg" not in self.stack:
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture
def run_dir(tmp_path):
    """40 steps of 1000 tokens, three quarters of them from `task`, in 2 s each; resumed at 20."""
    record = Jsonl(tmp_path / "metrics.jsonl")
    for step in range(1, 41):
        line = {"loss": 4 / step, "grad_norm": math.nan if step == 7 else 0.5, "lr": 1e-5, "seconds": 2.0}
        line |= {"tokens": 1000, "trained_tokens": 200, "tokens/task": 750, "tokens/replay": 250}
        line |= {
            "trained_tokens/task": 160,
            "trained_tokens/replay": 40,
            "loss/task": 2.0,
            "loss/replay": 1.0,
        }
        line |= {"tokens_per_s": 500.0 + step, "peak_memory_bytes": 3 * 2**30, "data_index": 8 * step}
        record.log("train", line, step=step)
        if step == 20:
            record.log("event", {"message": "resumed from step 20"}, step=20)
        if step in (1, 20, 40):
            metrics = {
                "task/loss": 8 / step,
                "task/perplexity": 9.0,
                "task/units": 77.0,
                "task/accuracy": step / 64,
            }
            record.log("eval", metrics | {"general/loss": 2 + step / 100}, step=step)
    rows = [
        {
            "prompt": "Reverse: <script>alert(1)</script>",
            "before": "a <i>&</i> b",
            "after": "b a",
            "reference": "b a",
        }
    ]
    record.log("samples", {"rows": rows}, step=40)
    record.close("done")
    config = {
        "name": "first <run>",
        "stage": {"name": "sft"},
        "data": {"train": [{"path": "https://x.org/d"}]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "result.json").write_text('{"status": "interrupted"}')
    return tmp_path


def test_the_numbers_are_on_the_page(run_dir):
    """Held-out 8 -> 0.2 and 2.01 -> 2.4; 40 * 1000 tokens, 200 of each thousand trained; median speed
    520.5; shares 30,000 and 10,000 of 40,000; of the trained tokens 160 and 40
    a step, of the loss 320 and 40 nats."""
    page = Page(build(run_dir).read_text())
    for expected in (
        "task loss 8 → 0.2 held out, step 1 to 40", "general loss 2.01 → 2.4", "task accuracy 0.0156 → 0.625",
        "steps 40 1 min 20 s of training", "tokens 40k 8000 trained", "tokens per second 52", "3 GiB",
        "task 30,000 6,400 75.0% 80.0% 88.9%", "replay 10,000 1,600 25.0% 20.0% 11.1%",
        "first <run> interrupted",
        "before a <i>&</i> b after b a reference b a", "step 20 resumed from step 20",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "units" not in page.text
    for title in (
        "Training loss",
        "Held-out loss",
        "Held-out accuracy",
        "Gradient norm",
        "Learning rate",
        "Speed",
    ):
        assert title in page.text
    assert page.tags.count("svg") == 7
    tiles = re.findall(r'class="tile (\w*)"><span>([^<]*)<', (run_dir / "report.html").read_text())
    assert {label: mood for mood, label in tiles if mood} == {
        "task loss": "good", "general loss": "bad", "task accuracy": "good",
    }  # fmt: skip


def test_the_page_loads_and_runs_nothing(run_dir):
    """No address in any attribute, no script, a policy that forbids the rest; texts are escaped."""
    text = build(run_dir).read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "href", "srcset", "onload", "onerror")
        assert "//" not in (value or "")
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text
    assert "<script>alert(1)" not in text
    assert "Reverse: <script>alert(1)</script>" in page.text
    assert "https://x.org/d" in page.text, "in the configuration, as text"


def test_it_is_written_at_evaluations_and_at_the_end(run_dir):
    (run_dir / "result.json").unlink()
    tracker = Report(run_dir, config={"name": "given"})
    tracker.log("train", {"loss": 1.0}, step=1)
    assert not (run_dir / "report.html").exists()
    tracker.log("eval", {"task/loss": 1.0}, step=1)
    assert "given running" in Page((run_dir / "report.html").read_text()).text
    tracker.close("failed")
    assert "given failed" in Page((run_dir / "report.html").read_text()).text
    build(run_dir)
    assert "not finished" in Page((run_dir / "report.html").read_text()).text


def test_it_can_be_made_again_by_hand_without_torch(run_dir):
    command = [sys.executable, "-X", "importtime", "-m", "framework.track.report", run_dir]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ)
    assert answer.stdout.strip() == str(run_dir / "report.html")
    assert " torch\n" not in answer.stderr
    refused = subprocess.run(command[:-1], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode
    assert "type: python -m framework.track.report RUN_DIR" in refused.stderr


def test_rollouts_have_their_charts(run_dir):
    """Reward and KL to the start of three rollouts beside the seven charts of any run."""
    record = Jsonl(run_dir / "metrics.jsonl", resume_step=40)
    for step in (10, 20, 30):
        record.log("rollout", {"reward": step / 40, "kl": 0.25, "seconds/generate": 1.0}, step=step)
    record.close("done")
    text = build(run_dir).read_text()
    assert Page(text).tags.count("svg") == 9
    assert "Reward, step 30: 0.75" in text
    assert "KL to the start, step 10: 0.25" in text


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"kind": "eval", "step": 0, "task/loss": "Infinity"}],
        [{"kind": "train", "step": 1, "loss": "NaN", "tokens": 5, "seconds": 0.5}],
        [{"kind": "retain", "step": 1, "x": 1}, {"kind": "samples", "step": 1, "rows": []}],
    ],
    ids=["nothing", "infinite", "not a number", "other kinds"],
)
def test_odd_records_make_a_page_too(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Page(build(tmp_path).read_text())


def test_ticks_are_round_and_enclose():
    assert chart.ticks(0, 60, 5) == [0, 20, 40, 60]
    assert chart.ticks(0.24, 2.9, 4) == [0, 1, 2, 3]
    assert chart.ticks(-3, -3, 4)[0] <= -3 <= chart.ticks(-3, -3, 4)[-1]
    for low, high in ((1e-9, 3e-9), (-5, 1e6), (0.1, 0.3), (99.9, 100.1)):
        found = chart.ticks(low, high, 4)
        assert found[0] <= low + 1e-12
        assert found[-1] >= high - 1e-12
        assert 3 <= len(found) <= 7


def test_a_line_breaks_where_a_value_is_missing():
    """Four points with NaN in the second: a lone first point, then a line through the last two."""
    text = chart.chart("x", {"a": [(0, 1.0), (1, math.nan), (2, 0.0), (3, 1.0)]})
    path = re.search(r' d="([^"]*)"', text)[1]
    assert re.sub(r"[\d. ]+", "", path) == "MML"
    left, right, bottom, top = chart.LEFT, chart.WIDTH - chart.RIGHT, chart.HEIGHT - chart.BOTTOM, chart.TOP
    places = [tuple(map(float, point.split())) for point in re.findall(r"[ML]([\d. ]+)", path)]
    assert places == [
        (left, top), (pytest.approx(left + (right - left) * 2 / 3, abs=0.1), bottom), (right, top),
    ]  # fmt: skip


def test_long_lines_are_averaged():
    """10,000 points become 239 means of 42; the mean of all stays."""
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    thin = chart._thin(points)
    assert len(thin) == math.ceil(10_000 / 42) <= chart.POINTS
    assert thin[0] == (41.0, pytest.approx(3.0))
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize(
    ("value", "short"),
    [(0, "0"), (2e-5, "2e-5"), (0.25, "0.25"), (980.4, "980"), (9804, "9804"), (255_000, "255k"),
     (8.5e6, "8.5M"), (2e9, "2G"), (3e12, "3T"), (math.inf, "inf"), (-0.5, "-0.5")],
)  # fmt: skip
def test_numbers_are_short(value, short):
    assert chart.number(value) == short


def test_what_a_stage_measures_has_a_chart(tmp_path):
    """Pairs: how many are ranked right, both rewards in one chart. A rollout's rewards by who gives them."""
    record = Jsonl(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        line = {"loss": 0.5, "rewards/accuracy": 0.75, "rewards/margin": 0.5, "rewards/chosen": 1.0}
        record.log("train", line | {"rewards/rejected": 0.5}, step=step)
        record.log("rollout", {"reward": 1.0, "reward/exact": 0.75, "reward/short": 0.25}, step=step)
    record.close("done")
    text = Page(build(tmp_path, status="done", config={}).read_text()).text
    for title in ("Ranked right share of training pairs", "Margin", "Rewards in training", "Rewards by who"):
        assert title in text
    assert "chosen rejected" in text
    assert "exact short" in text
    assert "Clipped" not in text
