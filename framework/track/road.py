"""report.html of a pipeline: what each step gained and what it cost, on one page that needs nothing else.

Made from the files of the pipeline's directory and of its steps' (config.yaml, metrics.jsonl, result.json),
so it can be made again at any time: python -m framework.track.road RUN_DIR
What a step did not measure is simply absent. A function's result.json may bring `measured` (by model: a
number, or [value, low, high] of a 95 % interval) `against` one of them, `samples` (rows), `facts`, a
`chain` of tasks (`track.chain`), and `ranked`: what share of the held-out pairs that it wrote trivial
rankings get right.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from framework.track import chain, jsonl, parts
from framework.track.chart import Points, chart, number
from framework.track.page import PAGE
from framework.track.parts import Record

MEASURES = {
    "accuracy": ("held-out accuracy", "{:.1%}"),
    "win_rate": ("win rate over {}", "{:.1%}"),
    "judged_win_rate": ("win rate over {} by the reward model", "{:.1%}"),
    "reward": ("reward", "{:.3g}"),
    "kl": ("KL to {}", "{:.3g}"),
    "general_loss": ("general loss", "{:.3f}"),
    "length": ("answer length", "{:.3g}"),
}
"""Columns of the first table: title, with {} for the model compared with; how a value is written."""

CURVES = (
    *((title, unit, "rollout", key) for title, unit, key in parts.ROLLOUT),
    ("Win rate", "against the start", "eval", "/win_rate"),
    ("Held-out accuracy", "", "eval", "/accuracy"),
    ("Held-out loss", "", "eval", "/loss"),
    ("Training loss", "", "train", "loss"),
)
"""Charts of all steps together: title, unit, kind of line, key; "/x" is that key of every held-out set."""


@dataclass(frozen=True)
class Stage:
    """One step as its files tell of it."""

    name: str
    kind: str
    run_dir: Path
    command: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    records: Sequence[Record]


def build(run_dir: Path) -> Path:
    """Write report.html of the pipeline in `run_dir` and return its path."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    status = _result(run_dir).get("status", "running")
    stages = [_read(name, entry) for name, entry in config["stages"].items()]
    return parts.write(run_dir, render(stages, name=config["name"], status=status))


def render(stages: Sequence[Stage], *, name: str, status: str) -> str:
    """The page. Every text that is not ours is escaped, and the page may load nothing."""
    measured = {m: values for stage in stages for m, values in stage.result.get("measured", {}).items()}
    samples = [row for stage in stages for row in stage.result.get("samples", ())]
    against = next((stage.result["against"] for stage in stages if "against" in stage.result), "the start")
    chains = [stage.result["chain"] for stage in stages if "chain" in stage.result]
    finished = [stage for stage in stages if stage.result.get("status") == "done"]
    seconds = sum(stage.result.get("seconds", 0.0) for stage in finished)
    about = f"{len(finished)} of {len(stages)} steps done · {parts.duration(seconds)}"
    sections = [
        parts.section("", _tiles(stages, measured), "tiles"),
        parts.section("The road", _road(measured, against), "scroll"),
        parts.section("Learnt, kept, lost", "".join(map(chain.figures, chains))),
        parts.section("Curves", _curves(stages), "charts"),
        parts.section("Samples along the way", parts.samples(samples), "samples"),
        parts.section("Steps", "".join(map(_step, stages)), "samples"),
    ]
    return PAGE.format(
        title=escape(name),
        status=escape(status),
        mood={"done": "good", "failed": "bad"}.get(status, "open"),
        about=escape(about),
        body="".join(sections),
    )


def _read(name: str, entry: Mapping[str, str]) -> Stage:
    where = Path(entry["run_dir"])
    metrics = where / "metrics.jsonl"
    return Stage(
        name=name,
        kind=entry["kind"],
        run_dir=where,
        command=entry["command"],
        config=yaml.safe_load(parts.content(where / "config.yaml")) or {},
        result=_result(where),
        records=list(jsonl.read(metrics)) if metrics.exists() else [],
    )


def _result(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(parts.content(directory / "result.json") or "{}")
    return found


def _tiles(stages: Sequence[Stage], measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Of each model that was measured and was trained here, the accuracy beside the one it started from.

    And of each reward model, the pairs that it ranks right beside those that trivial rankings do.
    """
    tiles = []
    for stage in stages:
        if stage.kind == "reward":
            tiles += _ranked(stage, stages)
        accuracy = measured.get(stage.name, {}).get("accuracy")
        if accuracy is None:
            continue
        value, low, high = _interval(accuracy)
        before = measured.get(_parent(stage, stages), {}).get("accuracy")
        text, mood = f"{value:.1%}", ""
        if before is not None:
            start = _interval(before)[0]
            text, mood = f"<i>{start:.1%} →</i> {value:.1%}", "good" if value > start else "bad"
        note = "held-out accuracy" + (f", 95 %: {low:.1%} to {high:.1%}" if low != high else "")
        tiles.append(parts.tile(stage.name, text, note, mood))
    return "".join(tiles)


def _ranked(stage: Stage, stages: Sequence[Stage]) -> list[str]:
    """A tile for each held-out set of a reward model."""
    tiles = []
    for source in stage.config.get("data", {}).get("eval") or ():
        right = (stage.result.get("metrics") or {}).get(f"{source.get('name')}/rewards/accuracy")
        if right is None:
            continue
        path = Path(str(source.get("path", "")))
        maker = next((other for other in stages if path.is_relative_to(other.run_dir)), stage)
        others: Mapping[str, float] = maker.result.get("ranked", {})
        note = "held-out pairs ranked right"
        note += "".join(f"; by {name} {share:.1%}" for name, share in others.items())
        mood = ("good" if right > max(others.values()) else "bad") if others else ""
        tiles.append(parts.tile(stage.name, f"{right:.1%}", note, mood))
    return tiles


def _parent(stage: Stage, stages: Sequence[Stage]) -> str:
    """The step whose model this one started from; "" where it is none of them."""
    path = Path(stage.config.get("model", {}).get("path", ""))
    return next((other.name for other in stages if path.is_relative_to(other.run_dir)), "")


def _road(measured: Mapping[str, Mapping[str, Any]], against: str) -> str:
    """A row for each model, a column for each measure that any of them has."""
    columns = [key for key in MEASURES if any(key in values for values in measured.values())]
    if not columns:
        return ""
    head = "".join(f"<th>{escape(MEASURES[key][0].format(against))}</th>" for key in columns)
    rows = []
    for name, values in measured.items():
        cells = "".join(f"<td>{_cell(key, values.get(key))}</td>" for key in columns)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    note = "<p><small>In brackets: 95 % intervals. Losses and KL in nats a token.</small></p>"
    return f'<table class="wide"><tr><th>model</th>{head}</tr>{"".join(rows)}</table>{note}'


def _cell(key: str, found: Any) -> str:
    if found is None:
        return ""
    write = MEASURES[key][1].format
    value, low, high = _interval(found)
    return write(value) + (f" <small>[{write(low)}, {write(high)}]</small>" if low != high else "")


def _interval(found: Any) -> tuple[float, float, float]:
    """(value, low, high); a plain number is an interval of no width."""
    value, low, high = found if isinstance(found, list) else (found, found, found)
    return float(value), float(low), float(high)


def _curves(stages: Sequence[Stage]) -> str:
    """One chart a quantity, one line a step of training that has it."""
    charts = []
    for title, unit, kind, key in CURVES:
        series: dict[str, Points] = {}
        for stage in stages:
            lines = [record for record in stage.records if record["kind"] == kind]
            for name in dict.fromkeys(name for record in lines for name in record):
                if (name == key or (key[0] == "/" and name.endswith(key))) and (
                    values := parts.points(lines, name)
                ):
                    series[f"{stage.name} {name.removesuffix(key)}".strip()] = values
        charts.append(chart(title, series, unit=unit, noisy=kind != "eval"))
    return "".join(charts)


def _step(stage: Stage) -> str:
    """A card: how it ended, its facts, the command that repeats it, its configuration."""
    result = stage.result
    about = [stage.kind, str(result.get("status", "not finished"))]
    if "steps" in result:
        about.append(f"{result['steps']:,} optimizer steps")
    if "seconds" in result:
        about.append(parts.duration(result["seconds"]))
    facts = {**result.get("facts", {}), **(result.get("metrics") or {})}
    facts |= {f"held-out pairs ranked by {name}": share for name, share in result.get("ranked", {}).items()}
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(_fact(v))}</td></tr>" for k, v in facts.items())
    table = f"<table>{rows}</table>" if rows else ""
    return (
        f"<article><h2>{escape(stage.name)}</h2><p><small>{escape(' · '.join(about))} · "
        f"{escape(str(stage.run_dir))}</small></p>{table}<pre>{escape(stage.command)}</pre>"
        f"{parts.configuration(stage.config)}</article>"
    )


def _fact(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "config.yaml").is_file():
        sys.exit("found no config.yaml of a pipeline; type: python -m framework.track.road RUN_DIR")
    print(build(Path(sys.argv[1])))
