"""What a run's report and a pipeline's road are both made of: pieces of HTML, and numbers from records.

Every text that is not ours is escaped here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from framework.track.page import CONFIGURATION

Record = Mapping[str, Any]

ROLLOUT = (
    ("Reward", "of sampled answers", "reward"),
    ("KL to the start", "nats a token", "kl"),
    ("Entropy", "nats a token", "entropy"),
    ("Answer length", "tokens", "length"),
)
"""Charts of "rollout" lines: title, unit, key."""

TRAIN = (
    ("Ranked right", "share of training pairs", ("rewards/accuracy",)),
    ("Margin", "between the answers of training pairs", ("rewards/margin",)),
    (
        "Rewards in training",
        "of its answers",
        ("rewards/chosen", "rewards/rejected", "rewards/desirable", "rewards/undesirable"),
    ),
    ("Clipped", "share of tokens", ("clip/low", "clip/high", "clip/dual")),
    ("KL in training", "nats a token", ("kl", "approx_kl")),
    ("Critic", "loss", ("value/loss",)),
)
"""Charts of "train" lines that a stage may have: title, unit, keys."""


def section(title: str, body: str, kind: str = "") -> str:
    """A part of the page under its heading; "" for one without content."""
    heading = f"<h2>{title}</h2>" if title else ""
    return f'<section>{heading}<div class="{kind}">{body}</div></section>' if body else ""


def tile(label: str, value: str, note: str, mood: str = "") -> str:
    """One number with what it means. `value` is HTML."""
    text = f"<span>{escape(label)}</span><b>{value}</b><small>{escape(note)}</small>"
    return f'<div class="tile {mood}">{text}</div>'


def samples(rows: Sequence[Record]) -> str:
    """Answers side by side, a card for each prompt."""
    cards = []
    for row in rows:
        answers = [
            f'<div class="{"after" if column == "after" else ""}"><span>{escape(str(column))}</span>'
            f"<p>{escape(str(text))}</p></div>"
            for column, text in row.items()
            if column != "prompt"
        ]
        prompt = f'<p class="prompt">{escape(str(row.get("prompt", "")))}</p>'
        cards.append(f'<article>{prompt}<div class="answers">{"".join(answers)}</div></article>')
    return "".join(cards)


def configuration(config: Mapping[str, Any]) -> str:
    """A whole tree, folded away."""
    if not config:
        return ""
    text = yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False, allow_unicode=True)
    return CONFIGURATION.format(text=escape(text))


def points(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """(step, value) wherever `key` is a number; "NaN" and "Infinity" count as such."""
    return [(float(record["step"]), float(record[key])) for record in records if record.get(key) is not None]


def duration(seconds: float) -> str:
    """For people: 45 s, 1 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def content(path: Path) -> str:
    """The text of a file; "" where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def write(directory: Path, page: str) -> Path:
    """report.html in `directory`, whole or not at all; its path."""
    path = directory / "report.html"
    temporary = directory / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path
