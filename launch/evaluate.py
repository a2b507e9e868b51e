"""Held-out metrics of a run's checkpoint: `python launch/evaluate.py RUN_DIR [KEY=VALUE ...]`

Runs in one process, or joins the others under torchrun. `data.eval` and anything else of the run's
configuration can be given another value: 'data.eval=[{path: other.jsonl}]'. Prints a table, and one line of
JSON with --json.

Exit status: 0 done, 2 refused (nothing was loaded), anything else failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.cluster import environ
from framework.config import record
from framework.errors import DONE, REFUSED, CheckpointError, UserError


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="a run's directory")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the run's configuration"
    )
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest one")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    given = parser.parse_intermixed_args(
        environ.strip_launcher_arguments(sys.argv[1:] if arguments is None else arguments)
    )
    try:
        run = record.load(given.run_dir / "config.yaml", overrides=given.overrides)
        where = given.run_dir
        if given.checkpoint is not None:
            where = given.run_dir / "checkpoints" / f"step-{given.checkpoint:06d}"
        from framework.config.work import measure  # imports torch: a refusal must not wait for it

        step, metrics = measure(run, where)
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    if os.environ.get("RANK", "0") == "0":
        if given.json:
            print(json.dumps({"step": step, "metrics": metrics}))
        else:
            print(f"{where}, step {step}")
            for name, value in metrics.items():
                print(f"  {name:<40} {value:.6g}")
    sys.exit(DONE)


if __name__ == "__main__":
    main()
