"""Settings and results of many runs in one picture, as inline SVG in the page's own colours.

`parallel` draws a line for each run through one axis a setting; `plane` two results against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from framework.track.chart import number, ticks

WIDTH, HEIGHT = 960, 330  # user units of the wide picture
LEFT, RIGHT, TOP, BOTTOM = 60, 60, 44, 22
SPREAD = 30.0  # a largest value that many times the smallest is drawn on a logarithmic axis
LABELS = 7  # values of an axis that are written beside it; more are shown by their ends

Value = float | str | None


@dataclass(frozen=True)
class Line:
    """One run: its value on each axis, None where it has none, and how good it is from 0 to 1, the best."""

    label: str
    values: Sequence[Value]
    share: float
    best: bool = False


def parallel(title: str, axes: Sequence[str], lines: Sequence[Line], *, log: Sequence[str] = ()) -> str:
    """A figure of parallel coordinates; "" where fewer than two axes have anything to tell.

    An axis of numbers is linear, or logarithmic where it is named in `log` or spans far; one with words has
    them in even steps.
    """
    if len(axes) < 2 or not lines:
        return ""
    parts, places = [], []
    for position, axis in enumerate(axes):
        x = LEFT + position * (WIDTH - LEFT - RIGHT) / (len(axes) - 1)
        found = [line.values[position] for line in lines if line.values[position] is not None]
        place, labels = _axis(found, log=axis in log)
        places.append((x, place))
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="name" x="{x:.1f}" y="{TOP - 22}" text-anchor="{_anchor(position, len(axes))}">'
            f"{escape(axis)}</text>"
        )
        side = ("end", -7) if position == 0 else ("start", 7)
        for label, up in labels:
            parts.append(
                f'<text x="{x + side[1]:.1f}" y="{_y(up) + 4:.1f}" text-anchor="{side[0]}">'
                f"{escape(label)}</text>"
            )
    for line in sorted(lines, key=lambda line: (line.best, line.share)):
        points = [
            (x, _y(place(value)))
            for (x, place), value in zip(places, line.values, strict=True)
            if value is not None
        ]
        way = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        told = ", ".join(
            f"{axis} {_told(value)}"
            for axis, value in zip(axes, line.values, strict=True)
            if value is not None
        )
        parts.append(
            f'<path class="{"best" if line.best else "run"}" style="{_colour(line)}" d="{way}">'
            f"<title>{escape(f'{line.label}: {told}')}</title></path>"
        )
    return (
        f'<figure class="wide"><figcaption>{escape(title)} <small>bolder is better, green is best</small>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg></figure>"
    )


def plane(title: str, axes: tuple[str, str], lines: Sequence[Line]) -> str:
    """A figure of two results, across and up, with the best ones joined; "" for fewer than two runs."""
    drawn = [line for line in lines if all(isinstance(value, float) for value in line.values)]
    if len(drawn) < 2:
        return ""
    width, height = 400, 290
    left, right, top, bottom = 58, 24, 14, 42
    spans = []
    for position in (0, 1):
        found = [float(line.values[position]) for line in drawn]  # type: ignore[arg-type]
        marks = ticks(min(found), max(found), 4)
        spans.append((marks, min(marks[0], *found), max(marks[-1], *found)))

    def at(line: Line) -> tuple[float, float]:
        across, up = (
            0.5 if high == low else (float(value) - low) / (high - low)  # type: ignore[arg-type]
            for value, (_, low, high) in zip(line.values, spans, strict=True)
        )
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = []
    for mark in spans[1][0]:
        _, y = at(Line("", (spans[0][1], mark), 0.0))
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{number(mark)}</text>')
    for mark in spans[0][0]:
        x, _ = at(Line("", (mark, spans[1][1]), 0.0))
        parts.append(f'<text x="{x:.1f}" y="{height - 24}" text-anchor="middle">{number(mark)}</text>')
    parts.append(
        f'<text class="name" x="{width / 2:.0f}" y="{height - 6}" text-anchor="middle">'
        f"{escape(axes[0])}</text>"
    )
    front = sorted(at(line) for line in drawn if line.best)
    if len(front) > 1:
        way = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in front)
        parts.append(f'<path class="front" d="{way}"/>')
    for line in sorted(drawn, key=lambda line: line.best):
        x, y = at(line)
        told = ", ".join(f"{axis} {_told(value)}" for axis, value in zip(axes, line.values, strict=True))
        parts.append(
            f'<circle class="{"best" if line.best else "run"}" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{6 if line.best else 4}"><title>{escape(f"{line.label}: {told}")}</title></circle>'
        )
    return (
        f"<figure><figcaption>{escape(title)} <small>up: {escape(axes[1])}</small></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg></figure>"
    )


def _axis(found: Sequence[Value], *, log: bool) -> tuple[Callable[[Value], float], list[tuple[str, float]]]:
    """Where a value stands on an axis, from 0 to 1, and what is written beside it."""
    numbers = [value for value in found if isinstance(value, float)]
    if len(numbers) < len(found):
        words = list(dict.fromkeys(map(_told, found)))
        steps = {word: (i + 0.5) / len(words) for i, word in enumerate(words)}
        return lambda value: steps[_told(value)], list(steps.items())
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    bent = low > 0 and (log or high / low >= SPREAD)

    def place(value: Value) -> float:
        assert isinstance(value, float)
        if high == low:
            return 0.5
        if bent:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    different = sorted(set(numbers))
    written = different if len(different) <= LABELS else _round(low, high, bent=bent)
    labels: list[tuple[str, float]] = []
    for value in written:
        up = place(value)
        if all(abs(up - other) > 0.055 for _, other in labels):
            labels.append((number(value), up))
    return place, labels


def _round(low: float, high: float, *, bent: bool) -> list[float]:
    """The ends of an axis and round numbers between them."""
    if bent:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        between = [10.0**power for power in powers]
    else:
        between = [tick for tick in ticks(low, high, 4) if low < tick < high]
    return [low, high, *between]


def _colour(line: Line) -> str:
    """Worse runs are fainter, so that what the good ones have in common stands out."""
    if line.best:
        return "stroke:var(--good)"
    return f"stroke:var(--line-2);stroke-opacity:{0.12 + 0.6 * line.share**2:.2f}"


def _told(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _y(up: float) -> float:
    return HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _anchor(position: int, count: int) -> str:
    return "start" if position == 0 else "end" if position == count - 1 else "middle"
