"""What is printed, and how often. Time is made by hand."""

import io

import pytest

from framework.track import console as module
from framework.track.console import Console


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def lines(stream):
    return stream.getvalue().splitlines()


def test_piped_output_is_whole_lines_now_and_then(clock):
    """A step a second for 35 s, a line every 10: 1, 11, 21, 31 and the last. At step 11, 10 steps took
    10 s, so the 24 left take 24 s."""
    stream = io.StringIO()
    tracker = Console(steps=35, stream=stream)
    for step in range(1, 36):
        tracker.log("train", {"loss": 2.0, "lr": 1e-5, "grad_norm": 0.5, "tokens_per_s": 1234.5}, step=step)
        clock[0] += 1
    assert [line.split()[2] for line in lines(stream)] == ["1/35", "11/35", "21/35", "31/35", "35/35"]
    assert lines(stream)[1] == "train step 11/35  loss 2.0000  lr 1.00e-05  grad 0.5  1,234 tok/s  eta 0:24"
    assert "\x1b" not in stream.getvalue()
    tracker.close("done")
    assert lines(stream)[-1].startswith("done at step 35 of 35 in 0:35, loss 2.0000")


def test_a_long_run_is_not_chatty(clock):
    """Ten hours of one-second steps: some hundreds of lines, not 3600."""
    stream = io.StringIO()
    tracker = Console(steps=36_000, stream=stream)
    for step in range(1, 36_001):
        tracker.log("train", {"loss": 2.0}, step=step)
        clock[0] += 1
    assert 300 < len(lines(stream)) < 700


def test_held_out_metrics_events_and_samples_are_always_printed(clock):
    stream = io.StringIO()
    tracker = Console(steps=9, stream=stream)
    tracker.log(
        "eval", {"task/loss": 1.5, "task/perplexity": 4.48, "task/units": 90.0, "general/loss": 2.0}, step=4
    )
    tracker.log("event", {"message": "resumed from step 3"}, step=3)
    tracker.log("samples", {"rows": [{"prompt": f"p{i}", "after": "x" * 999} for i in range(9)]}, step=4)
    text = stream.getvalue()
    assert "eval  step 4  task loss 1.5 perplexity 4.48  |  general loss 2" in text
    assert "units" not in text
    assert "resumed from step 3" in text
    assert "p2" in text
    assert "p3" not in text
    assert max(map(len, lines(stream))) < 260


def test_a_skipped_update_is_said_once_each_time(clock):
    stream = io.StringIO()
    tracker = Console(steps=9, stream=stream)
    for step, skipped in ((1, 0), (2, 1), (3, 1), (4, 3)):
        tracker.log("train", {"loss": float("nan"), "skipped": skipped}, step=step)
    said = [line for line in lines(stream) if "skipped" in line]
    assert [line.split(":")[0] for line in said] == ["step 2", "step 4"]
    assert "3 so far" in said[1]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["piped", "terminal"])
def test_text_of_others_is_text(clock, stream):
    """Neither rich markup nor terminal escapes of a model's answer take effect."""
    tracker = Console(steps=9, stream=stream)
    tracker.log(
        "samples", {"rows": [{"prompt": "[red]x[/red] [link=a]", "after": "a\x1b]0;title\x07b"}]}, step=1
    )
    tracker.log("event", {"message": "[/nothing]"}, step=1)
    tracker.close("failed")
    text = stream.getvalue()
    assert "[red]x[/red]" in text
    assert "[/nothing]" in text
    assert "\x1b]0;title" not in text


def test_a_terminal_gets_a_live_line(clock):
    stream = Terminal()
    tracker = Console(steps=20, stream=stream)
    tracker.log("train", {"loss": 2.5}, step=5)
    tracker.log("event", {"message": "hello"}, step=5)
    tracker.close("interrupted")
    assert "loss 2.5000" in stream.getvalue()
    assert "5/20" in stream.getvalue()
    assert "interrupted at step 5 of 20" in stream.getvalue()
    assert "\x1b[?25h" in stream.getvalue(), "the cursor is shown again"


def test_a_dumb_terminal_gets_plain_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Console(steps=20, stream=stream).log("train", {"loss": 2.5}, step=1)
    assert stream.getvalue() == "train step 1/20  loss 2.5000  eta -\n"


def test_none_is_silent(clock):
    stream = Terminal()
    tracker = Console(steps=20, mode="none", stream=stream)
    tracker.log("train", {"loss": 2.5}, step=5)
    tracker.close("done")
    assert stream.getvalue() == ""


def test_a_rollout_is_one_short_line_now_and_then(clock):
    """Twenty-five numbers an iteration would bury what a person follows; the record has them."""
    stream = io.StringIO()
    tracker = Console(steps=9, stream=stream)
    found = {"reward": 0.25, "kl": 0.0125, "length": 34.4, "finished_share": 0.96875, "mismatch/mean": 0.5}
    for step in (0, 1, 2):
        tracker.log("rollout", found, step=step)
        clock[0] += 6
    told = "reward 0.25, kl 0.0125, 34 tokens an answer, 97% finished"
    assert lines(stream) == [f"rollout step 0  {told}", f"rollout step 2  {told}"]


def test_right_answers_are_told_beside_or_without_perplexity(clock):
    stream = io.StringIO()
    tracker = Console(steps=9, stream=stream)
    answered = {"facts/right": 0.9, "facts/fall": 0.05, "facts/fall_high": 0.125, "facts/questions": 40.0}
    tracker.log("retain", answered, step=0)
    tracker.log("retain", {"chat/relative": 0.01, "chat/relative_high": 0.02, **answered}, step=9)
    told = "answered right: facts 90.0% (fell by 5.0%, at most 12.5%)"
    assert lines(stream) == [
        f"retain step 0  {told}",
        "retain step 9  perplexity against the start: chat +1.0% (at most +2.0%)",
        f"retain step 9  {told}",
    ]
