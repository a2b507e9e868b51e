"""A chain of tasks on a pipeline's page: every task after every stage, as a picture and in numbers.

Made from `chain` of a step's result.json, see `config.chain`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from framework.track import parts
from framework.track.chart import chart

MEANS = {
    "accuracy": ("at the end", "mean over the tasks", "ACC", ""),
    "learning_accuracy": ("when learnt", "mean of each task after its own stage", "LA", ""),
    "backward_transfer": ("since learnt", "mean change from then to the end", "BWT", "+"),
    "forgetting": ("forgotten", "mean fall from the best before to the end", "F", "+"),
}
"""Mean -> what it is called, what it is, its name in the literature, and its sign: "+" is a difference."""


def figures(chain: Mapping[str, Any]) -> str:
    """Means as tiles, one line a task over the stages, the matrix; "" without tasks."""
    stages, tasks = chain["stages"], chain["tasks"]
    if not tasks:
        return ""
    numbered = ", ".join(f"{number} {stage}" for number, stage in enumerate(stages))
    lines = {name: list(enumerate(map(float, task["scores"]))) for name, task in tasks.items()}
    drawn = chart("Every task after every stage", lines, unit=numbered, from_zero=True, over="stage")
    return (
        f'<div class="tiles">{_tiles(chain["means"])}</div><div class="charts">{drawn}</div>'
        f'<figure class="scroll">{_matrix(stages, tasks)}</figure>'
    )


def _tiles(means: Mapping[str, Mapping[str, Any]]) -> str:
    tiles = []
    for measure, found in means.items():
        of = f" of {measure}" if len(means) > 1 else ""
        for key, (label, note, short, sign) in MEANS.items():
            if (value := found.get(key)) is not None:
                text = _points(value) if sign else f"{value:.1%}"
                tiles.append(parts.tile(f"{label}{of}", text, f"{note} ({short})"))
    return "".join(tiles)


def _matrix(stages: Sequence[str], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each task; what its own stage made of it is set off."""
    head = "".join(f"<th>{escape(stage)}</th>" for stage in stages)
    rows = []
    for name, task in tasks.items():
        intervals = task.get("intervals", [None] * len(stages))
        cells = "".join(
            f"<td>{_cell(value, interval, own=stage == task['learnt'])}</td>"
            for stage, value, interval in zip(stages, task["scores"], intervals, strict=True)
        )
        forgotten = "" if task["forgetting"] is None else _points(task["forgetting"])
        about = f"{task['measure']} of {task['rows']} rows" if "rows" in task else task["measure"]
        rows.append(
            f"<tr><td>{escape(name)} <small>{escape(about)}</small></td>{cells}<td>{forgotten}</td>"
            f"<td>{_flips(task)}</td></tr>"
        )
    note = (
        "<p><small>In bold: after the stage that taught it, or as it came in where none did; such a task is "
        "in no mean. In brackets: 95 % intervals. Likelihood is the geometric mean of the probability of the "
        "tokens to be said. Forgetting: from the best before the end to the end, below 0 where it ended "
        "better than ever. Changed sides: right then wrong, wrong then right, at the end, less what guessing "
        "explains where a chance level was given.</small></p>"
    )
    return (
        f'<table class="wide"><tr><th>task</th>{head}<th>forgetting</th><th>changed sides</th></tr>'
        f"{''.join(rows)}</table>{note}"
    )


def _cell(value: float, interval: Sequence[float] | None, *, own: bool) -> str:
    text = f"<b>{value:.1%}</b>" if own else f"{value:.1%}"
    return text + (f" <small>[{interval[0]:.1%}, {interval[1]:.1%}]</small>" if interval else "")


def _points(difference: float) -> str:
    """A difference of two shares."""
    return f"{100 * difference:+.1f} points"


def _flips(task: Mapping[str, Any]) -> str:
    """Since which model how many were lost and gained."""
    return "; ".join(
        f"since {escape(stage)}: {found['lost']:.1%} lost, {found['gained']:.1%} gained"
        for stage, found in task.get("flips", {}).items()
    )
