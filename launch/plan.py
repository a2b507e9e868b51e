"""Will a run fit? `python launch/plan.py [--memory 80GiB] [--length N] [--json] KEY=VALUE ...`

Takes the same settings as launch/train.py. From the model's configuration alone, without weights and data, it
says what each rank will hold, compute and send, and if that is too much, which settings would help. With
--memory the device is taken to be a GPU unless launch.device=cpu; without, it is the one found here.

Exit status: 0 fits, 1 does not, 2 refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from framework.config import compose
from framework.errors import DONE, REFUSED, UserError

if TYPE_CHECKING:
    from framework.config.fitting import Verdict

TOO_LARGE = 1  # exit status
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=size, metavar="80GiB", help="of one device (that of the one found)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of an example (data.max_length)")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings as for launch/train.py")
    given = parser.parse_intermixed_args(arguments)
    if given.length is not None and given.length < 1:
        parser.error(f"--length: found {given.length}; expected 1 or more")
    try:
        run = compose.compose(given.overrides)
        from framework.config import fitting  # imports torch: a refusal must not wait for it

        verdict = fitting.judge(run, memory=given.memory, length=given.length)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    if given.json:
        print(json.dumps(verdict.record(), indent=1))
    else:
        show(verdict, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    sys.exit(DONE if verdict.fits else TOO_LARGE)


def size(text: str) -> int:
    """Bytes of "80GiB", "80GB" or "85899345920"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = found and UNITS.get(found[2].upper())
    if not found or not unit or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a size such as 80GiB or 24GB")
    return int(float(found[1]) * unit)


def show(verdict: Verdict, console: Console) -> None:
    """Print what was found."""
    plan = verdict.plan
    console.print(f"{plan.parameters['total']:,} parameters, {plan.parameters['trained']:,} of them trained")
    parts = {k: v for k, v in plan.parameters.items() if k not in ("total", "trained") and v}
    console.print(", ".join(f"{name} {count:,}" for name, count in parts.items()))
    console.print(_table(f"memory of one of {plan.ranks} ranks on {plan.device}", plan.memory, plan.peak))
    console.print(f"the moment of most: {plan.phase}")
    if plan.host:
        console.print(f"and in the memory of the host, for each rank: {gib(plan.host)}")
    console.print(
        f"a step: {plan.micro_batches} micro-batches of {plan.tokens_per_micro:,} tokens on each rank, "
        f"{plan.flops_per_step / 1e12:,.3g} TFLOP in all ({plan.flops_per_token / 1e9:.3g} GFLOP a token)"
        + (f", {plan.sent_per_step / 1e9:,.3g} GB sent by each rank" if plan.sent_per_step else "")
    )
    free = verdict.memory - plan.peak
    if verdict.fits:
        console.print(f"[green]fits[/]: {gib(free)} of {gib(verdict.memory)} left", soft_wrap=True)
        return
    console.print(f"[red]does not fit[/]: {gib(-free)} more than {gib(verdict.memory)}", soft_wrap=True)
    table = Table("to be added to the same command", "needs", "saves", "", "what it does", box=None)
    for change in verdict.changes:
        saved = plan.peak - change.plan.peak
        mark = "[green]fits[/]" if change.plan.peak <= verdict.memory else ""
        table.add_row(" ".join(change.settings), gib(change.plan.peak), gib(saved), mark, change.why)
    console.print(table)
    if verdict.together is not None:
        console.print(f"the fewest that fit: {' '.join(verdict.together.settings)}", soft_wrap=True)
    elif not any(change.plan.peak <= verdict.memory for change in verdict.changes):
        console.print("no setting of ours makes it fit: take a smaller model, more ranks or more memory")


def _table(title: str, parts: Any, total: int) -> Table:
    table = Table("", "GiB", title=title, title_justify="left", box=None)
    table.columns[1].justify = "right"
    for name, bytes_ in parts.items():
        table.add_row(name, f"{bytes_ / 2**30:.2f}")
    table.add_row("[bold]together[/]", f"[bold]{total / 2**30:.2f}[/]")
    return table


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
