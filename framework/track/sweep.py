"""report.html of a sweep: which settings did best, how the others did, and what did not come to an end.

Made from the records of the sweep's jobs and the result.json of their runs. Objectives are written
{"metric": NAME or None, "goal": "min" or "max"}; None is what the runs' own "best" follows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from framework.track import parts
from framework.track.chart import number
from framework.track.coordinates import Line, Value, parallel, plane
from framework.track.page import PAGE
from framework.track.parts import Record

SHOWN = 12  # columns of settings; a sweep of more has the rest in its runs' own pages


@dataclass(frozen=True)
class Row:
    """One job: its record, the settings that tell it from others, and how it did by each objective."""

    record: Record
    settings: Mapping[str, str]
    result: Mapping[str, Any]
    values: Sequence[float | None]

    @property
    def status(self) -> str:
        return str(self.record.get("status"))

    @property
    def counts(self) -> bool:
        """Whether it is done and every objective is a finite number."""
        return self.status == "done" and all(v is not None and math.isfinite(v) for v in self.values)


def value(result: Mapping[str, Any], metric: str | None) -> float | None:
    """A number of a `result.json`: a held-out metric, another entry, or with None what "best" follows."""
    if metric is None:
        found = result.get("objective")
    else:
        found = (result.get("metrics") or {}).get(metric, result.get(metric))
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def build(sweep: Path, described: Record, jobs: Sequence[Record]) -> Path:
    """Write report.html into the sweep's directory and return its path."""
    return parts.write(sweep, render(sweep, described, jobs))


def render(sweep: Path, described: Record, jobs: Sequence[Record]) -> str:
    """The page. Every text that is not ours is escaped, and the page may load nothing."""
    objectives = described.get("objectives") or [{"metric": None, "goal": "min"}]
    rows = read(jobs, objectives)
    names = _names(rows, objectives)
    ranked = rank(rows, objectives)
    front = best(rows, objectives)
    columns = list(dict.fromkeys(name for row in rows for name in row.settings))[:SHOWN]
    counted = [row for row in ranked if row.counts]
    lines = [_line(row, columns, at, counted, front) for at, row in enumerate(counted)]
    pictures = parallel("Settings and results", [*columns, *names], lines, log=described.get("log") or ())
    if len(objectives) == 2:
        flat = [Line(line.label, line.values[-2:], line.share, line.best) for line in lines]
        pictures += plane("What one costs the other", (names[0], names[1]), flat)
    status = str(described.get("status", "running"))
    found = [
        parts.section(_heading(objectives), "".join(_best(row, names) for row in front), "samples"),
        parts.section("Settings and results", pictures, "charts pictures"),
    ]
    sections = [
        parts.section("", _tiles(rows, front, names), "tiles"),
        *(found if len(objectives) == 1 else reversed(found)),  # a front is long
        parts.section("All that finished", _table(sweep, ranked, columns, names, front), "scroll"),
        parts.section("What did not", _unfinished([row for row in rows if row.status != "done"]), "scroll"),
        parts.section("This sweep", _about(described), "samples"),
    ]
    return PAGE.format(
        title=escape(sweep.resolve().name),
        status=escape(status),
        mood={"done": "good", "failed": "bad"}.get(status, "open"),
        about=escape(
            " · ".join(_aim(objective, name) for objective, name in zip(objectives, names, strict=True))
        ),
        body="".join(sections),
    )


def read(jobs: Sequence[Record], objectives: Sequence[Record]) -> list[Row]:
    """A row for each record. Settings are the overrides that differ from job to job."""
    typed = [dict(text.partition("=")[::2] for text in job.get("overrides", ())) for job in jobs]
    keys = dict.fromkeys(key for settings in typed for key in settings)
    varied = {key for key in keys if len({settings.get(key) for settings in typed}) > 1}
    varied |= {key for job in jobs for key in job.get("varied", {})}
    rows = []
    for job, settings in zip(jobs, typed, strict=True):
        file = Path(str(job.get("run_dir", ""))) / "result.json"
        result = json.loads(parts.content(file) or "{}") if job.get("status") == "done" else {}
        rows.append(
            Row(
                record=job,
                settings={key: settings[key] for key in keys if key in varied and key in settings},
                result=result,
                values=[value(result, objective["metric"]) for objective in objectives],
            )
        )
    return rows


def rank(rows: Sequence[Row], objectives: Sequence[Record]) -> list[Row]:
    """Jobs that are done, best first by the first objective; those without a finite value come last."""
    sign = 1.0 if objectives[0]["goal"] == "min" else -1.0
    done = [row for row in rows if row.status == "done"]
    return sorted(done, key=lambda row: (not row.counts, sign * row.values[0] if row.counts else 0.0))  # type: ignore[operator]


def best(rows: Sequence[Row], objectives: Sequence[Record]) -> list[Row]:
    """The best job; with several objectives the Pareto front: jobs that no other is at least as good as in
    all of them and better in one. In order of the first objective.
    """
    ranked = [row for row in rank(rows, objectives) if row.counts]
    if len(objectives) == 1:
        return ranked[:1]
    signs = [1.0 if objective["goal"] == "min" else -1.0 for objective in objectives]

    def costs(row: Row) -> list[float]:
        return [sign * v for sign, v in zip(signs, row.values, strict=True) if v is not None]

    def beats(one: Row, other: Row) -> bool:
        pairs = list(zip(costs(one), costs(other), strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return [row for row in ranked if not any(beats(other, row) for other in ranked)]


def _names(rows: Sequence[Row], objectives: Sequence[Record]) -> list[str]:
    """What the objectives are called."""
    followed = next((row.result["best"]["metric"] for row in rows if row.result.get("best")), None)
    return [str(objective["metric"] or followed or "objective") for objective in objectives]


def _aim(objective: Record, name: str) -> str:
    return f"{name}, {'smaller' if objective['goal'] == 'min' else 'larger'} is better"


def _heading(objectives: Sequence[Record]) -> str:
    return "The best" if len(objectives) == 1 else "Nothing is better in both: the Pareto front"


def _line(row: Row, columns: Sequence[str], at: int, counted: Sequence[Row], front: Sequence[Row]) -> Line:
    values: list[Value] = [_typed(row.settings.get(column)) for column in columns]
    share = 1 - at / max(len(counted) - 1, 1)
    return Line(_label(row), [*values, *row.values], share, row in front)


def _typed(text: str | None) -> Value:
    """A setting as a number where it is one."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _label(row: Row) -> str:
    return f"job {row.record.get('number', '')}".strip()


def _tiles(rows: Sequence[Row], front: Sequence[Row], names: Sequence[str]) -> str:
    """The best numbers, then what became of the jobs."""
    tiles = []
    for position, name in enumerate(names):
        if front:
            chosen = front[0] if position == 0 else front[-1]
            found = chosen.values[position]
            tiles.append(parts.tile(name, number(found or 0.0), f"{_label(chosen)}", "good"))
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    for status, count in counts.items():
        mood = {"done": "", "failed": "bad", "refused": "bad", "killed": "bad"}.get(status, "open")
        tiles.append(parts.tile(status, f"{count:,}", f"of {len(rows):,} jobs", mood))
    seconds = sum(row.record.get("seconds") or 0.0 for row in rows)
    tiles.append(parts.tile("time", parts.duration(seconds), "of all jobs together"))
    return "".join(tiles)


def _best(row: Row, names: Sequence[str]) -> str:
    """A card: how good, with which settings, and the command that does it again."""
    values = " · ".join(f"{name} {_number(found)}" for name, found in zip(names, row.values, strict=True))
    settings = "   ".join(f"{key}={text}" for key, text in row.settings.items())
    return (
        f"<article><h2>{escape(_label(row))}: {escape(values)}</h2><p>{escape(settings)}</p>"
        f"<pre>{escape(str(row.record.get('command', '')))}</pre>"
        f"<p><small>{escape(str(row.record.get('run_dir', '')))}</small></p></article>"
    )


def _table(
    sweep: Path, ranked: Sequence[Row], columns: Sequence[str], names: Sequence[str], front: Sequence[Row]
) -> str:
    """A line for each job that is done, best first; its number leads to its own page."""
    if not ranked:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("job", *names, *columns, "time"))
    lines = []
    for row in ranked:
        cells = [escape(_number(found)) for found in row.values]
        cells += [escape(row.settings.get(column, "")) for column in columns]
        cells.append(parts.duration(row.record.get("seconds") or 0.0))
        page = Path(str(row.record.get("run_dir"))) / "report.html"
        label = escape(_label(row))
        if page.exists():
            label = f'<a href="{escape(os.path.relpath(page, sweep))}">{label}</a>'
        inside = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr class="{"best" if row in front else ""}"><td>{label}</td>{inside}</tr>')
    return f'<table class="wide"><tr>{head}</tr>{"".join(lines)}</table>'


def _unfinished(rows: Sequence[Row]) -> str:
    """What became of the others, with the last line of what they said."""
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("job", "settings", "status", "last words"))
    lines = []
    for row in rows:
        settings = " ".join(f"{key}={text}" for key, text in row.settings.items())
        error = (str(row.record.get("error") or "").strip().splitlines() or [""])[-1]
        log = row.record.get("log")
        said = escape(error) + (f" <small>{escape(str(log))}</small>" if log and error else "")
        cells = "".join(f"<td>{cell}</td>" for cell in (escape(settings), escape(row.status), said))
        lines.append(f"<tr><td>{escape(_label(row))}</td>{cells}</tr>")
    return f'<table class="wide words"><tr>{head}</tr>{"".join(lines)}</table>'


def _about(described: Record) -> str:
    """The command that goes on with the sweep."""
    if "command" not in described:
        return ""
    return (
        f"<article><p><small>The same line goes on with what is missing; with --retry-failed it tries what "
        f"has failed again. Typed in {escape(str(described.get('directory', '')))}:</small></p>"
        f"<pre>{escape(str(described['command']))}</pre></article>"
    )


def _number(found: float | None) -> str:
    return "" if found is None else f"{found:.6g}"
