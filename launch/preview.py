"""See what a run would train on: `python launch/preview.py [--examples N] KEY=VALUE ...`

Takes the same settings as launch/train.py. Reads, renders and tokenises the data (and keeps it for the run),
then prints examples with their trained tokens marked, how the first step is cut into micro-batches, and
counts. In colours on a terminal; with trained tokens between marks elsewhere.

Exit status: 0 done, 2 refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from framework.config import compose
from framework.errors import DONE, REFUSED, UserError


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2, metavar="N", help="examples of each source (2)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings as for launch/train.py")
    given = parser.parse_intermixed_args(arguments)
    try:
        show(given.overrides, given.examples, Console(width=None if sys.stdout.isatty() else 140))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    sys.exit(DONE)


def show(overrides: Sequence[str], examples: int, console: Console) -> None:
    """Print what a run of these settings would train on. Raises UserError."""
    run = compose.compose(overrides)
    from framework.config import build  # imports torch: a refusal must not wait for it
    from framework.data import preview

    with console.status("reading") as status:
        prepared = build.prepare(
            run, progress=lambda name, rows: status.update(f"reading {name}: {rows:,} rows")
        )
    tokenizer = prepared.description.tokenizer
    for table in (*prepared.tables, *prepared.held_out):
        console.rule(f"{table.name} ({table.format})", align="left")
        for row in range(min(examples, len(table))):
            console.print(preview.example(table, row, tokenizer, colours=console.is_terminal), soft_wrap=True)
            console.print()
    cut = {
        "sequences": run.batch.sequences,
        "tokens_per_micro": run.batch.tokens_per_micro,
        "packing": run.data.packing,
        "ranks": run.launch.nproc * run.launch.nnodes,
    }
    console.print(preview.packed(prepared.tables, prepared.mixture, **cut), soft_wrap=True)
    console.print(preview.counts([*prepared.tables, *prepared.held_out]))
    epochs = prepared.mixture.epochs(prepared.steps * run.batch.sequences)
    share = prepared.run.replay.fraction  # none where nothing was carried
    console.print(
        f"{prepared.steps:,} steps of {run.batch.sequences} sequences: {epochs:.2f} epochs of data.train"
        + (f", {share:.0%} of trained tokens replayed" if share else ""),
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
