"""Prove that a run is one run, however it is spread: `python launch/certify.py [--half] [--device cuda]`

Trains a tiny random model for ten steps in every cell of stage, strategy, adapter, packing, accumulation and
ranks and compares loss, gradient and weights with one fp32 process. What the configuration refuses is shown
as refused. Writes every cell to a JSON file and the largest differences to a Markdown page.

Exit status: 0 all agree, 1 a cell disagrees or failed, 2 refused (nothing was run).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.config import cells
from framework.errors import DONE, REFUSED, ConfigError, UserError

DISAGREES = 1


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for axis, known in (
        ("stages", tuple(cells.STAGES)),
        ("strategies", cells.STRATEGIES),
        ("adapters", cells.ADAPTERS),
    ):
        parser.add_argument(
            f"--{axis}", default=",".join(known), metavar="A,B", help=f"of {', '.join(known)} (all)"
        )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="fp32 (default), bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu (default), cuda")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--half", action="store_true", help="every second cell; any two values still meet")
    size.add_argument("--cover", action="store_true", help="the fewest cells in which any two values meet")
    parser.add_argument("--json", type=Path, default=Path("runs/certificate.json"), metavar="FILE")
    parser.add_argument("--page", type=Path, metavar="FILE", help="such as docs/certificate.md (none)")
    given = parser.parse_args(arguments)
    try:
        wanted = list(
            cells.every(
                stages=_among("--stages", given.stages, tuple(cells.STAGES)),
                strategies=_among("--strategies", given.strategies, cells.STRATEGIES),
                adapters=_among("--adapters", given.adapters, cells.ADAPTERS),
                precision=given.precision,
            )
        )
        sys.exit(certify(wanted, given, sys.argv if arguments is None else ["launch/certify.py", *arguments]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def certify(wanted: Sequence[cells.Cell], given: argparse.Namespace, command: Sequence[str]) -> int:
    """Run and compare, printing each cell as it ends. Returns the exit status."""
    import torch  # a refusal must not wait for it
    from transformers.utils import logging

    from framework.config import certified, specimens
    from framework.config.certify import Certificate, refusal

    if given.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device here; type --device cpu")
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = specimens.write_model(place / "model", tied=True)
        specimens.write(place, model)
        if given.cover:
            kinds = {(cell.stage, cell.strategy, cell.adapter): cell for cell in wanted}
            refused = {
                kind: cell
                for kind, cell in kinds.items()
                if refusal(cell, place, model, device=given.device) is not None
            }

            def runs(cell: cells.Cell) -> bool:
                return (cell.stage, cell.strategy, cell.adapter) not in refused

            wanted = [*cells.cover(wanted, runs), *refused.values()]
        elif given.half:
            wanted = cells.half(wanted)
        devices = torch.cuda.device_count() if given.device == "cuda" else None
        certificate = Certificate(place, model, device=given.device, devices=devices)
        found, began = [], time.perf_counter()
        try:
            for number, one in enumerate(certificate.run(wanted), start=1):
                found.append(one)
                left = (time.perf_counter() - began) / number * (len(wanted) - number)
                numbers = "".join(f"  {name} {value:.0e}" for name, value in one.differences.items())
                print(
                    f"[{number}/{len(wanted)}, {left / 60:.0f} min left] {one.cell}: {one.verdict}{numbers}"
                    + (f"  {one.why}" if one.why else ""),
                    flush=True,
                )
        finally:
            certificate.close()
    certified.write(found, given.json, given.page, command=command)
    print(f"written: {given.json}" + (f", {given.page}" if given.page else ""))
    return DISAGREES if any(one.verdict in ("disagrees", "failed") for one in found) else DONE


def _among(flag: str, given: str, known: Sequence[str]) -> list[str]:
    chosen = [name.strip() for name in given.split(",")]
    for name in chosen:
        if name not in known:
            raise ConfigError(f"{flag}: found {name!r}; expected some of {', '.join(known)}")
    return chosen


if __name__ == "__main__":
    main()
