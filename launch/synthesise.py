"""General text in a model's own words: `python launch/synthesise.py model.path=MODEL [--out FILE] ...`

Takes the same settings as launch/train.py, of which model, synthesis, precision, data.max_length and launch
count: a run with the same ones and replay=synthesised finds what was written here. Interrupted, the same
command goes on. With --refresh FILE it answers the rows of a file anew instead, and keeps the file's own
answer where the model's is of no use or does not pass evaluate.score, a function of an answer and its row
that must give 1.

Exit status: 0 done, 2 refused, anything else failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.cluster import environ
from framework.config import compose
from framework.config.nodes import Source
from framework.errors import DONE, REFUSED, ConfigError, SapwoodError, UserError

NOTHING = "data.train=[{path: nothing}]"  # the one thing besides a model that a run must be given


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings as for launch/train.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to, besides the cache (JSONL)")
    parser.add_argument("--refresh", metavar="FILE", help="rows to answer anew, with the answers they have")
    given = parser.parse_intermixed_args(arguments)
    try:
        write(given.overrides, given.out, given.refresh)
    except SapwoodError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED if isinstance(error, UserError) else 1)
    sys.exit(DONE)


def write(overrides: Sequence[str], out: Path | None, refresh: str | None) -> None:
    """Write what was asked for and say where it is. Raises UserError."""
    if environ.place(os.environ) is not None:
        raise ConfigError(
            "found the ranks of another launcher; expected to start processes here; type "
            "launch.nproc=NUMBER instead"
        )
    run = compose.compose([NOTHING, *overrides])
    from framework.config import making, selfmade, targets  # imports torch: a refusal must not wait for it

    targets.rewards(run)
    order = selfmade.order_of(run)
    if refresh is not None:
        again = {"refresh": (Source(path=str(Path(refresh).absolute())),), "score": run.evaluate.score}
        order = order.model_copy(update=again)
    made = selfmade.make(order, making.inspect(order), without=selfmade.watched(run))
    print(made.told(), file=sys.stderr)
    print(made.path if out is None else made.copied(out))


if __name__ == "__main__":
    main()
