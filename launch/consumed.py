"""What a run has learnt from, row by row: `python launch/consumed.py RUN_DIR [--row HASH] [--out FILE]`

A line of JSON for every example of every step up to the newest checkpoint: step, term ("replay" where that
is a loss of its own), source, place, the hash of the row's content, and how often it came before. Rows of
reinforcement learning are questions, by the step before which they were answered. `--row` shows only rows of
these hashes (as in RUN/buffer and replay.excluded), so no line says that a row was never taken. At the end
stand the counts and a digest of all rows and their order: runs with the same digest consumed the same.

Works from the files that the run read, and refuses when they have changed. KEY=VALUE changes the run's
configuration, such as data.cache_dir or 'trusted_packages=[mine]'.

Exit status: 0 done, 2 refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.config import record
from framework.config.schema import Run
from framework.errors import DONE, REFUSED, CheckpointError, UserError


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="a run's directory")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the run's configuration"
    )
    parser.add_argument("--row", action="append", default=[], metavar="HASH", help="only these rows")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the lines there")
    given = parser.parse_intermixed_args(arguments)
    try:
        run = record.load(given.run_dir / "config.yaml", overrides=given.overrides)
        show(run.model_copy(update={"run_dir": str(given.run_dir)}), given.row, given.out)
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    except BrokenPipeError:  # a reader that has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(REFUSED)
    sys.exit(DONE)


def show(run: Run, wanted: Sequence[str], out: Path | None) -> None:
    """Write the lines. Raises UserError, CheckpointError."""
    from framework.config.consumed import Ledger  # imports torch: a refusal must not wait for it

    ledger = Ledger(run)
    shown = rows = 0
    with ExitStack() as closing:
        file = sys.stdout if out is None else closing.enter_context(out.open("w", encoding="utf-8"))
        for row in ledger:
            rows += 1
            if not wanted or row.row in wanted:
                shown += 1
                print(json.dumps(asdict(row), ensure_ascii=False), file=file)
        file.flush()
    chosen = f"{shown:,} of " if wanted else ""
    print(f"{chosen}{rows:,} examples in {ledger.steps:,} steps, digest {ledger.digest}", file=sys.stderr)


if __name__ == "__main__":
    main()
