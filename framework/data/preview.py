"""What the model will see, for people: examples with their trained tokens marked, and counts.

Pure functions of tables and a tokenizer that answer something `rich` prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table as Grid
from rich.text import Text

from framework.data import pack
from framework.data.loader import efficiency
from framework.data.mixture import Mixture
from framework.data.tables import Table

OPENED, CLOSED = "⟦", "⟧"  # marks of trained tokens where there are no colours


def example(table: Table, row: int, tokenizer: Any, *, colours: bool, limit: int = 4000) -> Text:
    """One example as the model reads it: its place, then its text with the trained tokens marked.

    In colours trained tokens stand out in green; otherwise they stand between ⟦ and ⟧. Cut after `limit`
    characters.
    """
    ids, trained = table.example(row)
    text = Text(f"{table.where(row)}  {len(ids)} tokens, {int(trained.sum())} trained\n", style="bold")
    start = 0
    shown = 0
    while start < len(ids) and shown < limit:
        stop = start + 1
        while stop < len(ids) and trained[stop] == trained[start]:
            stop += 1
        run = tokenizer.decode(
            ids[start:stop].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        cut = run[: limit - shown]
        if not trained[start]:
            text.append(cut, style="dim not bold")
        else:
            text.append(cut if colours else f"{OPENED}{cut}{CLOSED}", style="green not bold")
        shown += len(run)
        start = stop
    if start < len(ids) or shown > limit:
        text.append(" …", style="dim not bold")
    return text


def packed(
    tables: Sequence[Table],
    mixture: Mixture,
    *,
    sequences: int,
    tokens_per_micro: int,
    packing: bool,
    ranks: int,
) -> Text:
    """How the first optimizer step is cut: one line per micro-batch, its examples as source:tokens."""
    picks = mixture.picks(0, sequences)
    lengths = [int(tables[pick.source].lengths[pick.row]) for pick in picks]
    planned = pack.plan(lengths, tokens_per_micro=tokens_per_micro, ranks=ranks, packing=packing)
    text = Text(f"First step: {sequences} sequences on {ranks} ranks\n", style="bold")
    for rank, micros in enumerate(planned):
        for number, chosen in enumerate(micros):
            parts = " ".join(f"{tables[picks[i].source].name}:{lengths[i]}" for i in chosen) or "fill"
            cost = pack.cost_of([lengths[i] for i in chosen], packing)
            line = f"  rank {rank} micro {number}  {cost:>6} of {tokens_per_micro} tokens  {parts}\n"
            text.append(line, style="not bold")
    filled = efficiency(lengths, planned, tokens_per_micro)
    text.append(f"  packing efficiency {filled:.1%} of the token budget\n", style="not bold")
    return text


def counts(tables: Sequence[Table]) -> Grid:
    """One line per source: rows, tokens, trained tokens, what was dropped and truncated."""
    grid = Grid(title="Sources", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("source", "format"):
        grid.add_column(heading)
    for heading in ("rows", "kept", "tokens", "trained", "longest", "truncated"):
        grid.add_column(heading, justify="right")
    grid.add_column("dropped")
    for table in tables:
        c = table.counts
        dropped = ", ".join(f"{reason}: {count:,}" for reason, count in c.dropped.items()) or "none"
        numbers = (c.rows, c.kept, c.tokens, c.trained_tokens, int(table.lengths.max()), c.truncated)
        grid.add_row(table.name, table.format, *(f"{n:,}" for n in numbers), dropped)
    return grid
