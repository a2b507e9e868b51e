"""The configuration as it is shown and kept: resolved, readable, without secrets.

Secrets belong to the environment and nothing in the tree needs one. Should one come in all the same (by
`${oc.env:...}`, in a URL, typed on the command line), it goes no further: not to the run directory, not to a
dashboard. What a secret is `config.secrets` knows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from framework.config import explain
from framework.config.schema import Run
from framework.config.secrets import HIDDEN, Place, concealed, hidden, mask, named, walk
from framework.errors import ConfigError

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)\s*(?:,[^}]*)?\}")


def withheld(config: DictConfig) -> dict[Place, str]:
    """Values that read the environment, as written: they are kept so, and never resolved into a file."""
    found: dict[Place, str] = {}

    def look(value: Any, where: Place) -> Any:
        if isinstance(value, str) and "oc.env" in value:
            found[where] = value
        return value

    walk(OmegaConf.to_container(config, resolve=False), look)
    return found


def packed(run: Run) -> str:
    """A run as JSON for the processes that carry it out, with what is to be withheld from files and where its
    environment's rows are."""
    kept = [[list(where), text] for where, text in run._withheld.items()]
    return json.dumps({"run": run.model_dump(mode="json"), "withheld": kept, "rows": run._rows})


def unpacked(text: str) -> Run:
    """The run that `packed` made text of."""
    tree = json.loads(text)
    run = Run.model_validate_json(json.dumps(tree["run"]))
    run._withheld = {tuple(where): value for where, value in tree["withheld"]}
    run._rows = dict(tree["rows"])
    return run


def shown(run: Run) -> dict[str, Any]:
    """The whole tree as JSON, fit for files, dashboards and reports."""
    tree = concealed(run.model_dump(mode="json"))
    return walk(tree, lambda value, where: _as_written(run._withheld.get(where), value))


def masked(run: Run) -> Callable[[str], str]:
    """A function that hides this run's secrets in whatever is said."""
    return mask(run.model_dump(mode="json"))


def saved(run: Run) -> str:
    """The text of `config.yaml`: what was asked for, resolved, secrets left out."""
    head = (
        "# What this run was started with, every key resolved. Values of the environment are not written.\n"
    )
    return head + yaml.safe_dump(shown(run), sort_keys=False, allow_unicode=True, width=110)


def load(path: Path, *, trusted: Iterable[str] = (), overrides: Sequence[str] = ()) -> Run:
    """The run of a `config.yaml` that `saved` wrote, with `overrides` (KEY=VALUE) on top.

    The file is data: packages it says to trust are not, only `trusted` ones are, and of the environment it
    reads nothing that is named like a secret. Raises ConfigError.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not there; expected the directory of a run that was started") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {type(tree).__name__}; expected the mapping that a run saves")

    def read(value: Any, where: Place) -> Any:
        return _ENVIRONMENT.sub(_variable, value) if isinstance(value, str) else value

    tree = {**walk(tree, read), "trusted_packages": list(trusted)}
    for text in overrides:
        tree = _changed(tree, text)
    try:
        return Run.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(f"{path}:\n" + explain.validation(error, tree, list(overrides), [])) from error


def _changed(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """`tree` with one KEY=VALUE put in, VALUE in the grammar of the command line."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(f"{text}: not readable; expected KEY=VALUE") from error
    config = OmegaConf.create(tree)
    OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
    changed = OmegaConf.to_container(config, resolve=False)
    assert isinstance(changed, dict)
    return {str(key): value for key, value in changed.items()}


def _as_written(text: str | None, value: Any) -> Any:
    """`text` where it only names variables; a default beside one may be a secret, and then `value` stands."""
    return value if text is None or (value == HIDDEN and "," in text) else hidden(text)


def _variable(found: re.Match[str]) -> str:
    if named(found[1]):
        return found[0]
    return os.environ.get(found[1], found[0])
