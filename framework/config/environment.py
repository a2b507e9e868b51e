"""An environment of the configuration as data: its class is made, asked for its rows once, and those written.

What is written stands in the cache under its own content, one file a split, and is from then on a source like
any other: tokenised once, fingerprinted, the same after a resume or the run is refused. The processes that
carry a run out are told where the files are (`config.record`) and ask nobody.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.config import targets
from framework.config.nodes import Source
from framework.config.schema import Run
from framework.config.written import written
from framework.errors import ConfigError, UserError
from framework.rollout import environments
from framework.rollout.pool import SUPPLIED

SPLITS: tuple[environments.Split, ...] = ("train", "held_out")


def sources(run: Run) -> tuple[Sequence[Source], Sequence[Source]]:
    """What `run` learns from and what is held out: its own sources, or the rows of its environment.

    The first call of a start asks the environment and remembers on `run` where the rows are. Raises
    ConfigError for a class that cannot be made and DataError for rows that cannot be asked.
    """
    node = run.reward.environment
    if node is None:
        return run.data.train, run.data.eval
    if SPLITS[0] not in run._rows:
        environment = _made(run)
        directory = Path(run.data.cache_dir).expanduser() / "environments"
        run._rows |= {
            split: str(written(environments.read(environment, split), directory, f"{node.called}-{split}"))
            for split in SPLITS
        }
    train, held_out = (Source(path=run._rows[split], format="prompt", name=node.called) for split in SPLITS)
    return (train,), (held_out,)


def _made(run: Run) -> Any:
    """An instance of the class, as every process that scores makes its own."""
    bound = targets.environment(run)
    node = run.reward.environment
    assert bound is not None
    assert node is not None
    try:
        made = bound()
    except UserError:
        raise
    except Exception as error:
        # whatever a class of the user's raises
        keywords = ", ".join(f"{name}={value!r}" for name, value in bound.keywords.items())
        raise ConfigError(
            f"reward.environment: {node.target}({keywords}) raised {environments.told(error)}"
        ) from error
    parameters = inspect.signature(made.score).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in variadic}
    if strange := sorted(needed - set(SUPPLIED)):
        raise ConfigError(
            f"reward.environment: {node.target}.score needs {', '.join(strange)}; expected a method that "
            f"takes some of {', '.join(SUPPLIED)}"
        )
    return made
