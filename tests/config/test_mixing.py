"""What a share of replay is counted in, and whether it comes on top: from the keys to the stream."""

import json

import numpy as np
import pytest

from framework.config import build
from framework.config.compose import compose


@pytest.fixture
def prepared(tmp_path, tiny_model_dir):
    """A run of 100 short rows to learn; replayed are rows of long prompts and long answers."""
    short = [{"prompt": f"one {i}", "completion": "two " * (1 + i % 3)} for i in range(100)]
    long = [{"prompt": "one two " * (5 + i % 7), "completion": "three " * (10 + i % 5)} for i in range(40)]
    for name, rows in {"task": short, "general": long}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(*more):
        return build.prepare(compose([
            f"model.path={tiny_model_dir}", f"data.train=[{{path: {tmp_path}/task.jsonl}}]",
            f"data.cache_dir={tmp_path}/cache", f"run_dir={tmp_path}/run", "data.max_length=128",
            "batch.sequences=8", "retain=none", "replay=fixed", "replay.fraction=0.25",
            f"replay.sources=[{{path: {tmp_path}/general.jsonl}}]", *more,
        ]))  # fmt: skip

    return made


SIZES = {
    "trained_tokens": lambda table: table.trained,
    "tokens": lambda table: table.lengths,
    "rows": lambda table: np.ones(len(table)),
}


def given(run, share_of):
    """[320, 2] what the first examples give of data.train and of replay, counted in that way."""
    sizes = [SIZES[share_of](table) for table in run.tables]
    parts = np.zeros((320, 2))
    for at, pick in enumerate(run.mixture.picks(0, 320)):
        parts[at, pick.source] = sizes[pick.source][pick.row]
    return parts, sizes[1].max()


@pytest.mark.parametrize("share_of", SIZES)
def test_a_share_is_exact_in_what_it_is_counted_in(share_of, prepared):
    """At every prefix replay is off by less than its longest example; otherwise counted it is no quarter."""
    run = prepared(f"replay.share_of={share_of}", "steps=40")
    parts, longest = given(run, share_of)
    sums = parts.cumsum(0)
    assert (np.abs(sums[:, 1] - 0.25 * sums.sum(1)) < longest).all()
    for other in SIZES.keys() - {share_of}:
        sums = given(run, other)[0].sum(0)
        assert abs(sums[1] / sums.sum() - 0.25) > 0.02


def learnt(run):
    return sum(pick.source == 0 for pick in run.mixture.picks(0, run.steps * 8))


def test_replay_comes_on_top_or_in_place_as_is_asked(prepared):
    """By rows a quarter: 100 rows twice are 25 steps of eight alone, and 34 with replay on top."""
    rows = "replay.share_of=rows"
    plain, on_top, in_place = (
        prepared(rows, "epochs=2", f"replay.additive={how}") for how in ("null", "true", "false")
    )
    assert plain.steps == on_top.steps == 34
    assert 200 <= learnt(on_top) < 208
    assert in_place.steps == 25
    assert learnt(in_place) == 150

    plain, on_top, in_place = (
        prepared(rows, "steps=30", f"replay.additive={how}") for how in ("null", "true", "false")
    )
    assert plain.steps == in_place.steps == 30
    assert learnt(in_place) == 180
    assert on_top.steps == 40
    assert learnt(on_top) == 240


def test_what_a_share_is_counted_in_decides_which_checkpoint_fits(prepared):
    usual, rows = prepared("steps=30"), prepared("steps=30", "replay.share_of=rows")
    assert usual.identity != rows.identity
    assert usual.identity == prepared("steps=30", "replay.additive=false").identity
