"""What a person sees of a run: a live line on a terminal, a line now and then when piped.

Text that comes from data or models is printed as it is and never read as markup.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as Screen
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

SAMPLES = 3  # rows of a sample table that are shown; the report has all
_CUT = 240  # characters of a sample that are shown


class Console:
    """Progress of a run of `steps` optimizer steps.

    `mode` is "rich" (a live line), "plain" (whole lines: the first step, the last, and between them at
    most one in `every_s` seconds and one in every hundredth of the time so far), "auto" (rich where
    `stream` is a terminal) or "none".
    """

    def __init__(
        self, *, steps: int, mode: str = "auto", every_s: float = 10.0, stream: TextIO | None = None
    ) -> None:
        stream = sys.stdout if stream is None else stream
        width = None if stream.isatty() else 100
        self._screen = Screen(file=stream, quiet=mode == "none", highlight=False, width=width)
        live = stream.isatty() and not self._screen.is_dumb_terminal
        self._steps = steps
        self._every_s = every_s
        self._began: tuple[float, int] | None = None  # time and step of the first line: eta's origin
        self._printed = float("-inf")  # when a plain progress line was last printed
        self._retain_printed = float("-inf")  # and one of retention
        self._rollout_printed = float("-inf")  # and one of a rollout
        self._skipped = 0.0
        self._last: tuple[int, Mapping[str, Any]] = (0, {})
        self._live: Progress | None = None
        if mode == "rich" or (mode == "auto" and live):
            self._live = Progress(
                TextColumn("[bold]train"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}", markup=False),
                console=self._screen,
            )
            self._task = self._live.add_task("train", total=steps, line="starting")
            self._live.start()

    def log(self, kind: str, metrics: Mapping[str, Any], *, step: int) -> None:
        if kind == "train":
            self._train(metrics, step)
        elif kind == "samples":
            self._samples(metrics["rows"])
        elif kind == "retain":
            self._retained(metrics, step)
        elif kind == "rollout":
            self._rolled(metrics, step)
        elif kind == "event":
            self._print(str(metrics["message"]), "dim")
        elif kind != "interpolate":  # a curve, which an event sums up
            self._print(f"{kind:5} step {step}  {_sets(metrics)}", "bold")

    def artifact(self, path: Path, *, kind: str) -> None:
        self._print(f"{kind} in {path}", "dim")

    def close(self, status: str) -> None:
        step, metrics = self._last
        if self._live is not None:
            self._live.stop()
        if metrics:
            took = f" in {_clock(time.monotonic() - self._began[0])}" if self._began else ""
            self._print(f"{status} at step {step} of {self._steps}{took}, {_line(metrics)}", "bold")
        else:
            self._print(status, "bold")

    def _train(self, metrics: Mapping[str, Any], step: int) -> None:
        now = time.monotonic()
        self._last = (step, metrics)
        if self._began is None:
            self._began = (now, step)
        skipped = float(metrics.get("skipped", 0))
        if skipped > self._skipped:
            self._print(
                f"step {step}: update skipped, its gradient was not finite ({skipped:g} so far)", "yellow"
            )
        self._skipped = skipped
        line = f"{_line(metrics)}  eta {self._eta(now, step)}"
        if self._live is not None:
            self._live.update(self._task, completed=step, line=line)
        elif step == self._steps or now - self._printed >= max(self._every_s, (now - self._began[0]) / 100):
            self._printed = now
            self._print(f"train step {step}/{self._steps}  {line}")

    def _retained(self, metrics: Mapping[str, Any], step: int) -> None:
        """How much perplexity on general text rose and how many right answers were lost, kind by kind, with
        the upper ends of their 95 % intervals."""
        now = time.monotonic()
        if step not in (0, self._steps) and now - self._retain_printed < self._every_s:
            return
        self._retain_printed = now
        kinds = [key.removesuffix("/relative") for key in metrics if key.endswith("/relative")]
        told = (
            f"{kind} {float(metrics[f'{kind}/relative']):+.1%} "
            f"(at most {float(metrics[f'{kind}/relative_high']):+.1%})"
            for kind in kinds
        )
        if kinds:
            self._print(f"retain step {step}  perplexity against the start: {', '.join(told)}", "bold")
        asked = [key.removesuffix("/fall") for key in metrics if key.endswith("/fall")]
        answered = (
            f"{kind} {float(metrics[f'{kind}/right']):.1%} (fell by {float(metrics[f'{kind}/fall']):.1%}, "
            f"at most {float(metrics[f'{kind}/fall_high']):.1%})"
            for kind in asked
        )
        if asked:
            self._print(f"retain step {step}  answered right: {', '.join(answered)}", "bold")

    def _rolled(self, metrics: Mapping[str, Any], step: int) -> None:
        """How good and how long the answers of an iteration were; the record has all of it."""
        now = time.monotonic()
        if step > 0 and now - self._rollout_printed < self._every_s:
            return
        self._rollout_printed = now
        formats = {
            "reward": "reward {:.4g}",
            "kl": "kl {:.4g}",
            "entropy": "entropy {:.3g}",
            "length": "{:.0f} tokens an answer",
            "finished_share": "{:.0%} finished",
            "reward_failed_share": "{:.0%} not judged",
        }
        told = [form.format(float(metrics[key])) for key, form in formats.items() if key in metrics]
        self._print(f"rollout step {step}  {', '.join(told)}", "bold")

    def _eta(self, now: float, step: int) -> str:
        assert self._began is not None
        began, first = self._began
        return _clock((self._steps - step) * (now - began) / (step - first)) if step > first else "-"

    def _samples(self, rows: list[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        shown = [{column: _short(str(row.get(column, ""))) for column in columns} for row in rows[:SAMPLES]]
        if self._live is None:
            for row in shown:
                for column, text in row.items():
                    self._print(f"  {column:9} {text}")
                self._print("")
            return
        table = Table(*columns, expand=True, show_lines=True)
        for row in shown:
            table.add_row(*(Text(text) for text in row.values()))
        self._screen.print(table)

    def _print(self, text: str, style: str = "") -> None:
        self._screen.print(Text(text, style=style), soft_wrap=True)


def _line(metrics: Mapping[str, Any]) -> str:
    """The numbers of a train line that a person follows."""
    formats = {
        "loss": "loss {:.4f}",
        "lr": "lr {:.2e}",
        "grad_norm": "grad {:.3g}",
        "tokens_per_s": "{:,.0f} tok/s",
        "mfu": "mfu {:.1%}",
    }
    return "  ".join(form.format(float(metrics[key])) for key, form in formats.items() if key in metrics)


def _sets(metrics: Mapping[str, Any]) -> str:
    """Held-out metrics, set by set: "task loss 1.2345 perplexity 3.44"."""
    sets: dict[str, list[str]] = {}
    for key, value in metrics.items():
        name, _, metric = key.rpartition("/")
        if metric not in ("units", "tokens") and isinstance(value, int | float):
            sets.setdefault(name, []).append(f"{metric} {value:.4g}")
    return "  |  ".join(f"{name} {' '.join(parts)}".strip() for name, parts in sets.items())


def _short(text: str) -> str:
    text = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))  # no escape sequences
    return text if len(text) <= _CUT else text[: _CUT - 1] + "…"


def _clock(seconds: float) -> str:
    """3:07 or 1:03:07."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
