"""Event files as TensorBoard itself reads them: every number of metrics.jsonl, once, through kills."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from framework.config.compose import check
from framework.errors import ConfigError
from framework.track import jsonl, panels

ROOT = Path(__file__).parents[2]
GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]"]
START = """
import os, signal, sys
from pathlib import Path
from framework.track.jsonl import Jsonl
from framework.track.tensorboard import TensorBoard

def begin(resume_step):
    global trackers
    place, of = Path(sys.argv[1]), dict(resume_step=resume_step)
    trackers = [Jsonl(place / "metrics.jsonl", **of), TensorBoard(place, **of)]

def log(kind, metrics, step):
    for tracker in trackers:
        tracker.log(kind, metrics, step=step)

def both(*steps):
    for step in steps:
        log("rollout", {"reward": step / 4}, step - 1)
        log("train", {"loss": step / 2, "grad_norm": float("nan"), "mfu": 0.25}, step)
        log("eval", {"task/loss": 1 / step}, step)

def killed():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def accumulator():
    return pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def run(place, script, *, status=0):
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(script), str(place)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr


def shown(accumulator, place):
    """(name, step, value) of all that TensorBoard shows; its numbers are fp32."""
    events = accumulator.EventAccumulator(str(place / "tensorboard"), size_guidance={accumulator.SCALARS: 0})
    events.Reload()
    tags = events.Tags()
    scalars = [(name, e.step, f"{e.value:.6g}") for name in tags["scalars"] for e in events.Scalars(name)]
    texts = {
        name: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(name)]
        for name in tags["tensors"]
    }
    return sorted(scalars), texts


def expected(place):
    found = []
    for record in jsonl.read(place / "metrics.jsonl"):
        kind, step = record.pop("kind"), record.pop("step")
        if kind not in ("event", "samples"):
            numbers = panels.placed(kind, jsonl.numbers(record))
            found += [(name, step, f"{value:.6g}") for name, value in numbers.items()]
    return sorted(found)


def test_a_killed_run_goes_on_without_a_gap_or_a_double_step(accumulator, tmp_path):
    """Killed after step 5 with a checkpoint of step 3. Step 3 itself stays, rollout 3 comes again."""
    run(tmp_path, "begin(None); both(1, 2, 3, 4, 5); killed()", status=-9)
    run(tmp_path, "begin(3); both(4, 5, 6); [tracker.close('done') for tracker in trackers]")
    scalars, texts = shown(accumulator, tmp_path)
    assert scalars == expected(tmp_path)
    assert ("throughput/mfu", 6, "0.25") in scalars
    assert [step for step, _ in texts["events/text_summary"]] == [3]


def test_a_run_started_anew_hides_the_one_before(accumulator, tmp_path):
    run(tmp_path, "begin(None); both(1, 2, 3); killed()", status=-9)
    run(tmp_path, "begin(None); both(1, 2); [tracker.close('done') for tracker in trackers]")
    assert shown(accumulator, tmp_path)[0] == expected(tmp_path)


def test_a_run_that_gets_event_files_late_has_them_whole(accumulator, tmp_path):
    run(tmp_path, "begin(None); del trackers[1]; both(1, 2, 3)")
    for file in (tmp_path / "tensorboard").iterdir():
        file.unlink()
    run(tmp_path, "begin(3); both(4); [tracker.close('done') for tracker in trackers]")
    assert shown(accumulator, tmp_path)[0] == expected(tmp_path)


def test_samples_are_text_and_no_markup(accumulator, tmp_path):
    """Four blanks make a line Markdown's code: it is shown, not read."""
    rows = [{"prompt": "a <b>\n# heading", "after": "![x](http://y)"}]
    run(tmp_path, f"begin(None); log('samples', {{'rows': {rows!r}}}, 4); trackers[1].close('done')")
    ((step, text),) = shown(accumulator, tmp_path)[1]["samples/text_summary"]
    assert (step, text) == (4, "**prompt**\n\n    a <b>\n    # heading\n\n**after**\n\n    ![x](http://y)")


def test_a_missing_package_is_refused_by_name(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'sapwood\[tensorboard\]'"):
        check([*GIVEN, "tracker=tensorboard"])
