"""What the demonstration shows: stages with time, progress, and the page at the end.

On a terminal rich draws it; piped, every piece is a plain line as soon as it is known.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Moved = Callable[[int, int], None]
"""(done, total)"""

median = statistics.median


class Page:
    """The terminal, and a copy of the last page as text."""

    def __init__(self) -> None:
        self.console = Console(width=None if Console().is_terminal else 110, highlight=False)
        self._began = time.monotonic()
        self._text = ""

    def opening(self, place: Path, arms: Mapping[str, Sequence[str]]) -> None:
        """What is going to happen, so that nobody waits in the dark."""
        self.console.print(
            "[bold]Sapwood demonstration[/bold]: SmolLM2-135M-Instruct learns to reverse lists of words "
            f"(FSDP2, bf16, two ranks), {' and '.join(arms)}. A few minutes on two cores; "
            f"everything goes to {place}"
        )

    def stage(self, title: str) -> None:
        self.console.print(f"\n[bold][{self._clock()}][/bold] {title}")

    def say(self, text: str) -> None:
        self.console.print(f"  {text}", markup=False)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Moved]:
        """A bar on a terminal; piped, a line at every quarter."""
        if self.console.is_terminal:
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(title, total=total)
                yield lambda done, _: bar.update(task, completed=done)
            return
        quarters = 0

        def moved(done: int, total: int) -> None:
            nonlocal quarters
            if done * 4 // total > quarters:
                quarters = done * 4 // total
                self.say(f"{title}: {done}/{total}")

        yield moved

    def result(
        self, measured: Mapping[str, Mapping[str, Any]], talk: Sequence[str], place: Path, *, seconds: float
    ) -> None:
        """The last page: numbers, answers side by side, where everything is."""
        page = Console(record=True, width=self.console.width, highlight=False)
        page.print(f"\n[bold][{self._clock()}] What it learnt and what it kept[/bold]")
        page.print(_numbers(measured))
        start = measured["start"]
        if same := _at_the_same_step(measured):
            page.print(f"  {same}")
        page.print(
            f"  To compare: the most common answer scores {start['majority']:.0%}; the start model "
            f"shown three examples {start['few_shot']:.0%}.\n  Losses are nats per token of answers; general "
            "text is the start model's own answers on topics that are never replayed."
        )
        page.print(_answers(measured, talk))
        for arm in list(measured)[1:]:
            folder = place / arm.replace(" ", "-")
            page.print(
                f"  {arm}: model in {folder / 'model'}, curves in {folder / 'report.html'}", soft_wrap=True
            )
        page.print(
            f"  Talk to it: {os.path.relpath(sys.executable)} launch/generate.py {place / 'with-replay'}\n"
            f"  {seconds / 60:.1f} minutes for this demonstration.",
            soft_wrap=True,
        )
        self._text = page.export_text()

    def save(self, path: Path) -> None:
        """The last page as text."""
        path.write_text(self._text, encoding="utf-8")

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"{minutes}:{seconds:02d}"


def _at_the_same_step(measured: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The general losses where both trainings had gone as far: arms of different length compare there."""
    curves = {arm: column["general_loss_by_step"] for arm, column in measured.items() if arm != "start"}
    common = set.intersection(*(set(curve) for curve in curves.values()))
    last = max(common, key=int)
    if all(int(last) == measured[arm]["steps"] for arm in curves):
        return None
    losses = ", ".join(f"{curve[last]:.3f} {arm}" for arm, curve in curves.items())
    return (
        f"General text after the same {last} steps: {losses}. Scores on the task compare at equal steps "
        "only: the shorter training stops as soon as its sentences are lost."
    )


def _numbers(measured: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title_justify="left", padding=(0, 1))
    table.add_column("")
    for name in measured:
        table.add_column(name, justify="right")
    rows: list[tuple[str, str, Callable[[Any], str]]] = [
        ("task: held-out questions right", "accuracy", "{:.0%}".format),
        ("task: held-out loss", "task_loss", "{:.3f}".format),
        ("general text: held-out loss", "general_loss", "{:.3f}".format),
        ("optimizer steps", "steps", str),
        ("tokens per second", "tokens_per_s", "{:.0f}".format),
        ("peak memory of a rank, GiB", "peak_memory_bytes", lambda value: f"{value / 2**30:.1f}"),
    ]
    for title, key, write in rows:
        table.add_row(title, *(write(column[key]) if key in column else "" for column in measured.values()))
    return table


def _answers(measured: Mapping[str, Mapping[str, Any]], talk: Sequence[str]) -> Table:
    table = Table(title="Answers side by side", title_justify="left", show_lines=True, padding=(0, 1))
    table.add_column("question", ratio=2)
    for name in measured:
        table.add_column(name, ratio=3)
    sample = measured["start"]["task_sample"]
    words = sample["question"].rsplit(":", 1)[-1].strip()
    table.add_row(f"Reverse: {words}", *(_short(m["task_sample"]["said"]) for m in measured.values()))
    for number, question in enumerate(talk):
        table.add_row(question, *(_short(m["talk"][number]) for m in measured.values()))
    return table


def _short(text: str, characters: int = 240) -> str:
    """One line, markup characters made harmless."""
    line = " ".join(text.split()).replace("[", "\\[")
    return line if len(line) <= characters else line[:characters] + " ..."
