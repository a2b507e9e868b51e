"""Make a page again: `python launch/report.py DIR`, of a sweep, a pipeline or a single run.

Each writes report.html into its directory by itself; this makes it from the files that lie there, also while
jobs still run. Prints where it is.

Exit status: 0 done, 2 there is nothing to make it from.
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

import yaml

from framework.cluster import records
from framework.errors import DONE, REFUSED, ConfigError, UserError
from framework.track import report, road, sweep


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="of a sweep, a pipeline or a run")
    given = parser.parse_args(arguments)
    try:
        print(build(given.directory))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    sys.exit(DONE)


def build(where: Path) -> Path:
    """Write the page of whatever lies in a directory; its path. Raises ConfigError."""
    if (where / records.SWEEP).is_file():
        return sweep.build(where, records.read(where / records.SWEEP), records.every(where))
    config = where / "config.yaml"
    if config.is_file() and "stages" in (yaml.safe_load(config.read_text(encoding="utf-8")) or {}):
        return road.build(where)
    if (where / "metrics.jsonl").is_file():
        return report.build(where)
    sweeps = sorted(str(file.parent) for file in where.glob(f"*/{records.SWEEP}"))
    hint = f"; type one of {', '.join(sweeps)}" if sweeps else ""
    raise ConfigError(f"{where}: found no sweep, pipeline or run; expected the directory of one{hint}")


if __name__ == "__main__":
    main()
