"""The first figures of a report: what was learnt against what was forgotten, and when.

Made from "retain" lines and whatever says how the task went: held-out numbers, else rewards, else the
training loss.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from html import escape

from framework.track import parts
from framework.track.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Points, chart, number, ticks
from framework.track.parts import Record

MORE_IS_BETTER = ("accuracy", "score", "reward", "exact")


def figures(
    retained: Sequence[Record],
    held_out: Sequence[Record],
    rollouts: Sequence[Record],
    train: Sequence[Record],
    events: Sequence[Record],
    resumes: Sequence[float],
) -> str:
    """Gain against forgetting, forgetting and right answers over time, replay where it was steered, the last
    look in numbers, and whether a budget was kept; "" for a run that watched nothing.
    """
    kinds, asked = strata(retained), strata(retained, "/right")
    if not kinds and not asked:
        return ""
    changes = {kind: _percent(parts.points(retained, f"{kind}/relative")) for kind in kinds}
    what, gains = gain(held_out, rollouts, train, set(kinds))
    replay = {
        name: parts.points(retained, key)
        for name, key in (("share", "replay/share"), ("coefficient", "replay/coefficient"))
        if parts.points(retained, key)
    }
    return (
        tradeoff(what, gains, _worst(changes))
        + chart(
            "Forgotten",
            changes,
            unit="% more perplexity on general text than at the start",
            marks=resumes,
            from_zero=True,
        )
        + chart(
            "Answered right",
            {kind: _percent(parts.points(retained, f"{kind}/right")) for kind in asked},
            unit="% of the same questions",
            marks=resumes,
        )
        + chart("Replay", replay, unit="steered to keep the budget", marks=resumes, from_zero=True)
        + (_table(retained[-1], kinds) if kinds else "")
        + _verdict(events)
    )


def strata(retained: Sequence[Record], ending: str = "/relative") -> list[str]:
    """Names of the kinds of text that were watched; with "/right" of those that were asked about."""
    names = (key for record in retained for key in record if key.endswith(ending))
    return list(dict.fromkeys(name.removesuffix(ending) for name in names))


def gain(
    held_out: Sequence[Record], rollouts: Sequence[Record], train: Sequence[Record], general: set[str]
) -> tuple[str, Points]:
    """What the task has gained since the first time it was measured, and in which terms.

    The first that was measured twice: an accuracy, score or held-out loss of a set that is not `general`
    text, the reward of rollouts, the loss of training.
    """
    names = dict.fromkeys(key for record in held_out for key in record if "/" in key)
    own = [name for name in names if name.rpartition("/")[0] not in general]
    wanted = (*MORE_IS_BETTER, "loss")
    ranked = sorted(
        (n for n in own if n.rpartition("/")[2] in wanted), key=lambda n: wanted.index(n.rpartition("/")[2])
    )
    candidates = [(name, held_out, name) for name in ranked]
    candidates += [("reward of rollouts", rollouts, "reward"), ("training loss", train, "loss")]
    for label, records, key in candidates:
        points = [(x, y) for x, y in parts.points(records, key) if math.isfinite(y)]
        if len(points) > 1:
            sign = -1.0 if key.rpartition("/")[2] == "loss" else 1.0
            first = points[0][1]
            word = "fall of" if sign < 0 else "rise of"
            return f"{word} {label}", [(x, sign * (y - first)) for x, y in points]
    return "", []


def tradeoff(what: str, gains: Points, forgotten: Points) -> str:
    """One path through the run: to the right what the worst kind of text lost, upwards what was gained."""
    path = [(step, x, _at(gains, step)) for step, x in forgotten if gains]
    path = [(step, x, y) for step, x, y in path if math.isfinite(x) and math.isfinite(y)]
    if len(path) < 2:
        return ""
    x_ticks = ticks(min(0.0, *(x for _, x, _ in path)), max(0.0, *(x for _, x, _ in path)), 5)
    y_ticks = ticks(min(0.0, *(y for *_, y in path)), max(0.0, *(y for *_, y in path)), 4)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for y in y_ticks:
        _, at = place(x_ticks[0], y)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        at, _ = place(x, y_ticks[0])
        drawn.append(f'<text x="{at:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{number(x)} %</text>')
    zero, _ = place(0.0, 0.0)
    drawn.append(f'<line class="mark" x1="{zero:.1f}" x2="{zero:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    spots = [(step, x, y, *place(x, y)) for step, x, y in path]
    line = "L".join(f"{at:.1f} {up:.1f}" for *_, at, up in spots)
    drawn.append(f'<path class="line" style="stroke:var(--line-0)" d="M{line}"/>')
    for step, x, y, at, up in spots:
        radius = 4.0 if step == path[-1][0] else 2.5
        drawn.append(f'<circle cx="{at:.1f}" cy="{up:.1f}" r="{radius}" style="fill:var(--line-0)"/>')
        told = f"step {step:.0f}: gained {y:.4g}, forgot {x:.3g} %"
        drawn.append(f'<circle class="hit" cx="{at:.1f}" cy="{up:.1f}" r="7"><title>{told}</title></circle>')
    unit = f"upwards {what}; to the right % more perplexity on the worst kind of general text"
    return (
        f"<figure><figcaption>Learnt against forgotten <small>{escape(unit)}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="task gain against forgetting">'
        + "".join(drawn)
        + "</svg></figure>"
    )


def _verdict(events: Sequence[Record]) -> str:
    """What became of a budget of forgetting."""
    judged = [event for event in events if "verdict" in event]
    if not judged:
        return ""
    last = judged[-1]
    moods = {"kept": "good", "kept by interpolation": "good", "infeasible": "bad"}
    mood = moods.get(str(last["verdict"]), "open")
    return parts.tile("forgetting budget", escape(str(last["verdict"])), str(last["message"]), mood)


def _table(last: Record, kinds: Sequence[str]) -> str:
    """The last look in numbers."""
    rows = "".join(
        f"<tr><td>{escape(kind)}</td><td>{float(last[f'{kind}/relative']):+.2%}</td>"
        f"<td>{float(last[f'{kind}/change']):+.4f}</td>"
        f"<td>{float(last[f'{kind}/low']):+.4f} to {float(last[f'{kind}/high']):+.4f}</td>"
        f"<td>{float(last[f'{kind}/units']):,.0f}</td></tr>"
        for kind in kinds
        if f"{kind}/relative" in last
    )
    head = (
        "<tr><th>general text</th><th>perplexity</th><th>nats a token</th><th>95 % interval</th>"
        "<th>tokens</th></tr>"
    )
    return f'<figure class="scroll"><table>{head}{rows}</table></figure>'


def _percent(points: Points) -> Points:
    return [(x, 100 * y) for x, y in points]


def _worst(changes: dict[str, Points]) -> Points:
    """The largest change of any kind, step by step."""
    at: dict[float, float] = {}
    for points in changes.values():
        for x, y in points:
            at[x] = max(at.get(x, -math.inf), y)
    return sorted(at.items())


def _at(points: Points, step: float) -> float:
    """The value at `step`, between two points on the line that joins them; the nearest end outside."""
    xs = [x for x, _ in points]
    after = bisect_right(xs, step)
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[after - 1], points[after]
    return low + (high - low) * (step - left) / (right - left)
