"""What the model will see, for people: examples with their trained tokens marked, and counts.

Pure functions of tables and a tokenizer that answer something `rich` prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table as Grid
from rich.text import Text

from framework.data import pack
from framework.data.collate import Kind
from framework.data.loader import SUPERVISED, efficiency, plan
from framework.data.mixture import Mixture
from framework.data.tables import Part, Table

OPENED, CLOSED = "⟦", "⟧"  # marks of trained tokens where there are no colours


def example(table: Table, row: int, tokenizer: Any, *, colours: bool, limit: int = 4000) -> Text:
    """One example as the model reads it: its place, then its text with the trained tokens marked.

    A prompt and the answers to it come under headings. In colours trained tokens stand out in green;
    otherwise they stand between ⟦ and ⟧. Each part is cut after `limit` characters.
    """
    parts = table.parts(row)
    tokens, trained = sum(len(p.ids) for p in parts), sum(int(p.trained.sum()) for p in parts)
    text = Text(f"{table.where(row)}  {tokens} tokens, {trained} trained\n", style="bold")
    for number, part in enumerate(parts):
        if part.title:
            lead = "\n" if number else ""
            text.append(f"{lead}── {part.title}, {len(part.ids)} tokens ──\n", style="bold")
        _append(text, part, tokenizer, colours, limit)
    return text


def _append(text: Text, part: Part, tokenizer: Any, colours: bool, limit: int) -> None:
    ids, trained = part.ids, part.trained
    start = shown = 0
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


def packed(
    tables: Sequence[Table],
    mixture: Mixture,
    *,
    sequences: int,
    tokens_per_micro: int,
    packing: bool,
    ranks: int,
    kind: Kind = SUPERVISED,
) -> Text:
    """How the first optimizer step is cut: one line per micro-batch, its examples as source:tokens."""
    where = [(pick.source, pick.row) for pick in mixture.picks(0, sequences)]
    extents = [kind.extent(tables, where, i, packing=packing) for i in range(sequences)]
    planned = plan(extents, tokens_per_micro=tokens_per_micro, ranks=ranks, packing=packing)
    text = Text(f"First step: {sequences} sequences on {ranks} ranks\n", style="bold")
    for rank, micros in enumerate(planned):
        for number, chosen in enumerate(micros):
            taken = [extents[i] for i in chosen]
            parts = " ".join(f"{tables[where[i][0]].name}:{extents[i].tokens}" for i in chosen) or "fill"
            lengths = [extent.tokens if packing else extent.longest for extent in taken]
            cost = pack.cost_of(lengths, packing, [extent.rows for extent in taken])
            line = f"  rank {rank} micro {number}  {cost:>6} of {tokens_per_micro} tokens  {parts}\n"
            text.append(line, style="not bold")
    filled = efficiency([extent.tokens for extent in extents], planned, tokens_per_micro)
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
