"""report.html: what became of a run, on one page that needs nothing else to be read.

Made from the files of the run directory (metrics.jsonl, config.yaml, result.json), so it can be made
again at any time: python -m framework.track.report RUN_DIR
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from framework.track import interpolation, jsonl, parts, retention
from framework.track.chart import COLOURS, Points, chart, number
from framework.track.page import PAGE
from framework.track.parts import Record

COUNTS = ("units", "tokens")  # of a held-out set: not a quality
MORE_IS_BETTER = ("accuracy", "reward", "score", "exact")


class Report:
    """Writes `run_dir`/report.html at each evaluation and at the end.

    `config` is the configuration to show, without secrets; None shows config.yaml. Goes behind the
    tracker that writes metrics.jsonl.
    """

    def __init__(self, run_dir: Path, *, config: Mapping[str, Any] | None = None) -> None:
        self._run_dir = Path(run_dir)
        self._config = config

    def log(self, kind: str, metrics: Mapping[str, Any], *, step: int) -> None:
        if kind == "eval":
            build(self._run_dir, status="running", config=self._config)

    def artifact(self, path: Path, *, kind: str) -> None:
        """Artifacts are found by their place in the run directory."""

    def close(self, status: str) -> None:
        build(self._run_dir, status=status, config=self._config)


def build(run_dir: Path, *, status: str | None = None, config: Mapping[str, Any] | None = None) -> Path:
    """Write report.html and return its path. What is not given is read from the run directory."""
    records = list(jsonl.read(run_dir / "metrics.jsonl"))
    if config is None:
        config = yaml.safe_load(parts.content(run_dir / "config.yaml")) or {}
    if status is None:
        status = json.loads(parts.content(run_dir / "result.json") or "{}").get("status", "not finished")
    page = render(records, config=config, status=status, name=Path(run_dir).resolve().name)
    return parts.write(run_dir, page)


def render(records: Sequence[Record], *, config: Mapping[str, Any], status: str, name: str) -> str:
    """The page. Every text that is not ours is escaped, and the page may load nothing."""
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"]
    rollouts = [record for record in records if record["kind"] == "rollout"]
    retained = [record for record in records if record["kind"] == "retain"]
    events = [record for record in records if record["kind"] == "event"]
    samples = [record for record in records if record["kind"] == "samples"]
    resumes = [record["step"] for record in events if "resumed" in record["message"]]
    title = str(config.get("name") or name)
    kept = retention.figures(retained, held_out, rollouts, train, events, resumes)
    kept += interpolation.figures([record for record in records if record["kind"] == "interpolate"])
    sections = [
        parts.section("Learnt and forgotten", kept, "charts"),
        parts.section("", _tiles(train, held_out), "tiles"),
        parts.section("Curves", _curves(train, held_out, rollouts, resumes), "charts"),
        parts.section("Samples", parts.samples(samples[-1]["rows"]) if samples else "", "samples"),
        parts.section("Where the tokens came from", _sources(train)),
        parts.section("What happened", _events(events)),
        parts.section("Configuration", parts.configuration(config)),
    ]
    return PAGE.format(
        title=escape(title),
        status=escape(status),
        mood={"done": "good", "failed": "bad"}.get(status, "open"),
        about=escape(" · ".join(_about(config))),
        body="".join(sections),
    )


def _about(config: Mapping[str, Any]) -> Iterable[str]:
    """What was trained on what, in a few words."""
    for path in ("stage.name", "model.path", "adapter.kind", "strategy.name", "precision"):
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            yield str(value)


def _tiles(train: Sequence[Record], held_out: Sequence[Record]) -> str:
    """Held-out numbers before and after, then what it took."""
    tiles = []
    for metric in _metrics(held_out):
        points = parts.points(held_out, metric)
        (first, before), (last, after) = points[0], points[-1]
        name, _, what = metric.rpartition("/")
        if what == "perplexity":
            continue  # the exponential of the loss: its curve says nothing new
        up = any(word in what for word in MORE_IS_BETTER)
        mood = "" if first == last or before == after else "good" if (after > before) == up else "bad"
        value = number(after) if first == last else f"<i>{number(before)} →</i> {number(after)}"
        steps = f"step {last:,.0f}" if first == last else f"step {first:,.0f} to {last:,.0f}"
        tiles.append(parts.tile(f"{name} {what}", value, f"held out, {steps}", mood))
    if train:
        tokens, seconds = _total(train, "tokens"), _total(train, "seconds")
        tiles.append(parts.tile("steps", f"{train[-1]['step']:,}", f"{parts.duration(seconds)} of training"))
        tiles.append(
            parts.tile("tokens", number(tokens), f"{number(_total(train, 'trained_tokens'))} trained")
        )
        if rates := [y for _, y in parts.points(train, "tokens_per_s")]:
            tiles.append(parts.tile("tokens per second", number(statistics.median(rates)), "median"))
        for key, form, about in (
            ("tflops", "{:.3g} TFLOP/s", "of training, per rank, median"),
            ("mfu", "{:.1%}", "of what the device could do, median"),
        ):
            if rates := [y for _, y in parts.points(train, key)]:
                name = {"tflops": "computed", "mfu": "MFU"}[key]
                tiles.append(parts.tile(name, form.format(statistics.median(rates)), about))
        if peaks := [y for _, y in parts.points(train, "peak_memory_bytes")]:
            tiles.append(parts.tile("peak memory", f"{max(peaks) / 2**30:.3g} GiB", "of the largest process"))
    return "".join(tiles)


def _curves(
    train: Sequence[Record],
    held_out: Sequence[Record],
    rollouts: Sequence[Record],
    resumes: Sequence[float],
) -> str:
    by_source = sorted({key for record in train for key in record if key.startswith("loss/")})
    losses = {"all": parts.points(train, "loss")}
    if len(by_source) > 1:
        losses |= {key.removeprefix("loss/"): parts.points(train, key) for key in by_source}
    charts = [chart("Training loss", losses, unit="nats a token", marks=resumes, noisy=True)]
    by_metric: dict[str, dict[str, Points]] = {}
    for metric in _metrics(held_out):
        name, _, what = metric.rpartition("/")
        by_metric.setdefault(what, {})[name] = parts.points(held_out, metric)
    for what, series in by_metric.items():
        if what != "perplexity":
            only = "" if len(series) > 1 else next(iter(series))
            charts.append(chart(f"Held-out {what}", series, unit=only, marks=resumes))
    for title, unit, key in parts.ROLLOUT:
        charts.append(
            chart(title, {title: parts.points(rollouts, key)}, unit=unit, marks=resumes, noisy=True)
        )
    for title, unit, keys in parts.TRAIN:
        series = {key.rpartition("/")[2]: parts.points(train, key) for key in keys}
        series = {name: points for name, points in series.items() if points}
        charts.append(chart(title, series, unit=unit, marks=resumes, noisy=True))
    judges = dict.fromkeys(key for record in rollouts for key in record if key.startswith("reward/"))
    if len(judges) > 1:
        series = {key.removeprefix("reward/"): parts.points(rollouts, key) for key in judges}
        charts.append(chart("Rewards", series, unit="by who gives them", marks=resumes, noisy=True))
    memory = [(step, value / 2**30) for step, value in parts.points(train, "peak_memory_bytes")]
    for title, unit, points, noisy, from_zero in (
        ("Gradient norm", "before clipping", parts.points(train, "grad_norm"), True, False),
        ("Learning rate", "", parts.points(train, "lr"), False, True),
        ("Speed", "tokens per second", parts.points(train, "tokens_per_s"), True, True),
        ("Computed", "TFLOP/s of training per rank", parts.points(train, "tflops"), True, True),
        ("Peak memory", "GiB, largest process", memory, False, True),
    ):
        charts.append(
            chart(title, {title: points}, unit=unit, marks=resumes, noisy=noisy, from_zero=from_zero)
        )
    return "".join(charts)


def _sources(train: Sequence[Record]) -> str:
    """Tokens by source, as a bar and a table."""
    names = list(dict.fromkeys(key[7:] for record in train for key in record if key.startswith("tokens/")))
    tokens = {name: _total(train, f"tokens/{name}") for name in names}
    total = sum(tokens.values())
    if not total:
        return ""
    nats = {name: _nats(train, name) for name in names}
    lost = sum(nats.values())  # 0 where there is one source, or no loss of tokens
    learnt = _total(train, "trained_tokens")
    bar, rows = [], []
    for i, (name, count) in enumerate(tokens.items()):
        colour = f"background:var(--line-{i % COLOURS})"
        bar.append(f'<i style="{colour};flex:{count / total:.6f}"></i>')
        trained = _total(train, f"trained_tokens/{name}")
        rows.append(
            f'<tr><td><i class="key" style="{colour}"></i>{escape(name)}</td><td>{count:,.0f}</td>'
            f"<td>{trained:,.0f}</td><td>{count / total:.1%}</td>"
            + (f"<td>{trained / learnt:.1%}</td><td>{nats[name] / lost:.1%}</td></tr>" if lost else "</tr>")
        )
    head = "<tr><th>source</th><th>tokens</th><th>trained</th><th>of the tokens</th>"
    head += "<th>of the trained</th><th>of the loss</th></tr>" if lost else "</tr>"
    return f'<div class="bar">{"".join(bar)}</div><table>{head}{"".join(rows)}</table>'


def _events(events: Sequence[Record]) -> str:
    lines = "".join(
        f"<li><b>step {event['step']}</b> {escape(str(event['message']))}</li>" for event in events
    )
    return f'<ul class="events">{lines}</ul>' if lines else ""


def _metrics(held_out: Sequence[Record]) -> list[str]:
    """Names of held-out qualities, "<set>/<metric>", losses first."""
    names = dict.fromkeys(key for record in held_out for key in record if "/" in key)
    kept = [name for name in names if name.rpartition("/")[2] not in COUNTS and parts.points(held_out, name)]
    return sorted(kept, key=lambda name: not name.endswith("/loss"))


def _nats(train: Sequence[Record], name: str) -> float:
    """The loss on a source over all its trained tokens; 0 where it has no loss of its own."""
    losses, tokens = (dict(parts.points(train, f"{key}/{name}")) for key in ("loss", "trained_tokens"))
    return sum(loss * tokens.get(step, 0.0) for step, loss in losses.items())


def _total(records: Sequence[Record], key: str) -> float:
    return sum(value for _, value in parts.points(records, key))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "metrics.jsonl").is_file():
        sys.exit("found no metrics.jsonl; type: python -m framework.track.report RUN_DIR")
    print(build(Path(sys.argv[1])))
