"""What a metric is called on a dashboard: its part before the first "/" is the section it is drawn in.

metrics.jsonl says who reported a number ("train" line, key "grad_norm"); a page says what it is about
("optimizer/grad_norm"), the same way for every stage. Shared by all dashboards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECTIONS = {
    "loss": "min,last",
    "held-out": "min,max,last",
    "reward": "max,last",
    "kl": "max,last",
    "retention": "max,last",
    "policy": "last",
    "rollout": "last",
    "sources": "last",
    "optimizer": "max,last",
    "throughput": "mean,max,last",
    "memory": "max",
    "progress": "last",
    "train": "last",
}
"""Section -> what a table of runs shows of its metrics."""

OBJECTIVE = "objective"
"""What "best" follows, by one name for every run: the metric that a sweep of a dashboard is told."""

_CALLED = {
    ("train", "loss"): "loss/train",
    ("train", "kl"): "kl/train",
    ("rollout", "kl"): "kl/rollout",
    ("rollout", "kl_k3"): "kl/rollout_k3",
}

_RULES = {
    "eval": ((".*", "held-out"),),
    "retain": ((".*", "retention"),),
    "rollout": (
        ("reward.*|score|advantage.*", "reward"),
        ("kl.*", "kl"),
        ("seconds/.*", "throughput"),
        ("value.*|return", "policy"),
        (".*", "rollout"),
    ),
    "train": (
        ("loss/.*|(.*/)?(loss|nll|log_odds)", "loss"),
        ("rewards/.*|logps/.*|baseline", "reward"),
        ("(.*_)?kl(_.*)?", "kl"),
        ("ratio|clip/.*|entropy|gate|value/.*", "policy"),
        ("grad_norm|lr|skipped", "optimizer"),
        ("tokens_per_s|seconds|mfu|tflops|.*_efficiency", "throughput"),
        (".*memory.*", "memory"),
        ("(.*_)?(tokens|sequences|micros|data_index|epoch)", "progress"),
        (".*", "train"),
    ),
}
"""Kind of line -> (pattern of a whole key, section), the first that fits."""

_SOURCE = re.compile("(loss|loss_share|trained_share|(?:replay_)?(?:sequences|tokens|trained_tokens))/(.+)")

_BY_SOURCE = ("tokens", "replay_tokens")  # what every source of a line has


def placed(kind: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by their names on a page. No two of a line get one name."""
    sources = {name for what, _, name in (key.partition("/") for key in metrics) if what in _BY_SOURCE}
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, int | float):
            name = _name(kind, key, sources)
            found[name if name not in found else f"{name.partition('/')[0]}/{kind}/{key}"] = value
    return found


def _name(kind: str, key: str, sources: set[str]) -> str:
    source = _SOURCE.fullmatch(key)
    if kind == "train" and source and source[2] in sources:
        return f"sources/{key}"
    if (kind, key) in _CALLED:
        return _CALLED[kind, key]
    section = next((name for rule, name in _RULES.get(kind, ()) if re.fullmatch(rule, key)), kind)
    for said in (f"{section}/", f"{section}s/"):  # rewards/margin is reward/margin
        key = key.removeprefix(said)
    return f"{section}/{key}"
