"""A picture of arms: what of the new task is learnt against what of the old is kept. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Point = tuple[float, float]


def draw(where: Path, rows: Sequence[Mapping[str, Any]], *, gained: str, kept: Mapping[str, str]) -> None:
    """A panel for each measure of `kept` (name: title), means over seeds with their standard deviation.

    `rows` are those of the table. The line joins the arms that no other beats in both.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "forgetting", "font.size": 9, "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(kept), figsize=(4.2 * len(kept) + 2.4, 4.2), squeeze=False)
    colours = pyplot.get_cmap("tab20")
    for panel, (measure, title) in zip(panels[0], kept.items(), strict=True):
        shown = [row for row in rows if measure in row and gained in row]
        points = [(row[measure][0], row[gained][0]) for row in shown]
        for number, (row, point) in enumerate(zip(shown, points, strict=True)):
            panel.errorbar(
                *point,
                xerr=row[measure][1],
                yerr=row[gained][1],
                fmt="osD^v"[number % 5],
                color=colours(number % 20),
                label=row["arm"],
                capsize=2,
            )
        best = front(points)
        panel.plot(*zip(*best, strict=True), color="grey", linewidth=0.8, zorder=0)
        panel.set_xlabel(f"{title} (1: nothing is forgotten, 0: as without protection)")
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("new task learnt (1: as without protection)")
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    where.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(where, metadata={"Date": None})


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other is at least as good as in both and better in one, from left to right."""
    best = {
        one
        for one in points
        if not any(other != one and other[0] >= one[0] and other[1] >= one[1] for other in points)
    }
    return sorted(best)
