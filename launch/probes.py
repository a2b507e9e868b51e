"""Text to measure forgetting on: `python launch/probes.py --out DIRECTORY [--from FILE ...] [KEY=VALUE ...]`

With --from, takes rows of your files, a kind of text each, and writes what is left of them beside it, to be
replayed: NAME.jsonl and NAME-rest.jsonl. Without it the model of model.path=MODEL writes rows of six kinds,
by settings as for launch/synthesise.py. No row says what a file of --against says. Prints what to type.

Exit status: 0 done, 2 refused, anything else failed.
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

from framework.config import compose
from framework.errors import DONE, REFUSED, ConfigError, SapwoodError, UserError

NOTHING = "data.train=[{path: nothing}]"  # the one thing besides a model that a run must be given


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings as for launch/train.py")
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="where to")
    parser.add_argument("--from", nargs="+", dest="files", default=[], metavar="[NAME:]FILE")
    parser.add_argument("--against", nargs="+", default=[], metavar="FILE", help="what is trained on")
    parser.add_argument("--rows", type=int, default=256, help="most rows of each kind (256)")
    given = parser.parse_intermixed_args(arguments)
    try:
        write(given)
    except SapwoodError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED if isinstance(error, UserError) else 1)
    sys.exit(DONE)


def write(given: argparse.Namespace) -> None:
    """Write what was asked for and say what to do with it. Raises UserError."""
    if given.rows < 1:
        raise ConfigError(f"--rows: found {given.rows}; expected at least 1")
    if given.files and given.overrides:
        raise ConfigError(
            f"{given.overrides[0]}: a setting beside files, which no model writes; leave out one of them"
        )
    files = named(given.files)
    run = None if files else compose.compose([NOTHING, *given.overrides])
    from framework.config import measuring  # imports torch: a refusal must not wait for it

    options = {"rows": given.rows, "against": given.against}
    if run is None:
        strata = measuring.from_files(files, given.out, **options)
    else:
        strata = measuring.from_model(run, given.out, **options)
    for stratum in strata:
        beside = f"; the rest of it, to be replayed: {stratum.rest}" if stratum.rest else ""
        print(f"{stratum.path}: {stratum.rows} rows{beside}", file=sys.stderr)
    print(measuring.typed(strata))


def named(files: Sequence[str]) -> dict[str, str]:
    """Files by the kind of text they are: NAME:FILE, or called after the file."""
    found: dict[str, str] = {}
    for text in files:
        name, colon, path = text.partition(":")
        name, path = (name, path) if colon and path else (Path(text).name.split(".")[0], text)
        if name in found:
            raise ConfigError(f"--from: found {name} twice; expected a name each; type {name}2:{path}")
        found[name] = path
    return found


if __name__ == "__main__":
    main()
