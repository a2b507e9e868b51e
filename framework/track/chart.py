"""Line charts as inline SVG: no script, no picture file, colours by CSS so that dark mode is the page's.

Drawn by hand rather than by a plotting library so that a chart scales with the page, follows its
colours and fonts, and shows numbers under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 420, 230  # user units; the picture is as wide as its column
LEFT, RIGHT, TOP, BOTTOM = 50, 18, 10, 26
POINTS = 240  # drawn at most per line; more are averaged in groups
COLOURS = 8  # --line-0 ... --line-7 in the page's style

Points = Sequence[tuple[float, float]]
"""(step, value) in order of step. A value that is not finite breaks the line."""


def chart(
    title: str,
    series: Mapping[str, Points],
    *,
    unit: str = "",
    marks: Sequence[float] = (),
    noisy: bool = False,
    from_zero: bool = False,
    over: str = "step",
) -> str:
    """A figure of some lines over the steps, or what `over` names; "" when no value is finite.

    `marks` are steps to be marked by a dashed line. A `noisy` line of more than 60 points is faint and
    its moving average is drawn over it. `from_zero` starts the axis of values at 0, for quantities
    whose ratio matters.
    """
    drawn = {name: _thin(points) for name, points in series.items()}
    finite = [(x, y) for points in drawn.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    xs, ys = [x for x, _ in finite], [y for _, y in finite] + [0.0] * from_zero
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 4)
    left, right = min(xs), max(xs)
    low, high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if right == left else (x - left) / (right - left)
        up = 0.5 if high == low else (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        _, at = place(left, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in (tick for tick in x_ticks if left <= tick <= right):
        at, _ = place(x, low)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{number(x)}</text>')
    for mark in (mark for mark in marks if left <= mark <= right):
        at, _ = place(mark, low)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for i, (name, points) in enumerate(drawn.items()):
        colour = f"var(--line-{i % COLOURS})"
        if noisy and len(points) > 60:
            parts.append(_path(points, place, colour, "raw"))
            parts.append(_path(_smooth(points), place, colour, "line"))
        else:
            parts.append(_path(points, place, colour, "line"))
        for x, y in points[:: max(len(points) // 60, 1)]:
            if math.isfinite(y):
                at, up = place(x, y)
                radius = 2.5 if len(points) <= 30 else 0
                label = f"{escape(name)}, {over} {x:.10g}: {y:.6g}"
                parts.append(f'<circle cx="{at:.1f}" cy="{up:.1f}" r="{radius}" style="fill:{colour}"/>')
                parts.append(
                    f'<circle class="hit" cx="{at:.1f}" cy="{up:.1f}" r="7"><title>{label}</title></circle>'
                )
    legend = "".join(
        f'<li><i style="background:var(--line-{i % COLOURS})"></i>{escape(name)}</li>'
        for i, name in enumerate(drawn)
    )
    return (
        f"<figure><figcaption>{escape(title)}{f' <small>{escape(unit)}</small>' if unit else ''}</figcaption>"
        + (f'<ul class="legend">{legend}</ul>' if len(drawn) > 1 else "")
        + f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over {over}s">'
        + "".join(parts)
        + "</svg></figure>"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose low..high."""
    if high == low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (-1.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def number(value: float) -> str:
    """Short for an axis or a tile: 12k, 3.4M, 0.25, 2e-5."""
    size = abs(value)
    if not math.isfinite(value):
        return f"{value:g}"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if letter == "k" else limit
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}".replace("e-0", "e-") if size < 1e3 else f"{value:.4g}"


def _thin(points: Points) -> Points:
    """At most POINTS points: means of equal groups, of their finite values."""
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(group[-1][0], _mean([y for _, y in group])) for group in groups]


def _smooth(points: Points) -> Points:
    """Mean over a tenth of the points around each."""
    reach = max(len(points) // 20, 1)
    around = (points[max(at - reach, 0) : at + reach + 1] for at in range(len(points)))
    return [(x, _mean([y for _, y in near])) for (x, _), near in zip(points, around, strict=True)]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _path(points: Points, place, colour: str, kind: str) -> str:  # type: ignore[no-untyped-def]
    steps, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        at, up = place(x, y)
        steps.append(f"{pen}{at:.1f} {up:.1f}")
        pen = "L"
    return f'<path class="{kind}" style="stroke:{colour}" d="{"".join(steps)}"/>'
