"""The configuration as it is shown and kept: resolved, readable, without secrets.

Secrets belong to the environment and nothing in the tree needs one. Should one come in all the same (by
`${oc.env:...}`, in a URL, typed on the command line), it goes no further: not to the run directory, not to a
dashboard.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from framework.config import explain
from framework.config.schema import Run
from framework.errors import ConfigError

HIDDEN = "***"

_SECRET = re.compile(
    r"(^|[_\-.])(api_?key|key|token|secret|passw(or)?d|passphrase|credentials?|auth)([_\-.]|$)", re.IGNORECASE
)
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)\s*(?:,[^}]*)?\}")
_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")

Path_ = tuple[str | int, ...]
"""Where a value stands: keys and indices from the root."""


def withheld(config: DictConfig) -> dict[Path_, str]:
    """Values that read the environment, as written: they are kept so, and never resolved into a file."""
    found: dict[Path_, str] = {}

    def look(value: Any, where: Path_) -> Any:
        if isinstance(value, str) and "oc.env" in value:
            found[where] = value
        return value

    _walk(OmegaConf.to_container(config, resolve=False), look)
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

    def show(value: Any, where: Path_) -> Any:
        if where in run._withheld:
            return run._withheld[where]
        if not isinstance(value, str):
            return value
        if any(isinstance(part, str) and _SECRET.search(part) for part in where):
            return HIDDEN
        return hidden(value)

    tree: dict[str, Any] = _walk(run.model_dump(mode="json"), show)
    return tree


def hidden(text: str) -> str:
    """A line that was typed or said, without secrets of the environment and of URLs."""
    for secret in _secret_values(os.environ):
        text = text.replace(secret, HIDDEN)
    return _IN_URL.sub(HIDDEN, text)


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

    def read(value: Any, where: Path_) -> Any:
        return _ENVIRONMENT.sub(_variable, value) if isinstance(value, str) else value

    tree = {**_walk(tree, read), "trusted_packages": list(trusted)}
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


def _variable(found: re.Match[str]) -> str:
    if _SECRET.search(found[1]):
        return found[0]
    return os.environ.get(found[1], found[0])


def _secret_values(environment: Mapping[str, str]) -> list[str]:
    """Values of variables named like secrets, longest first. Shorter than 8 they are words, not secrets."""
    values = {value for name, value in environment.items() if _SECRET.search(name) and len(value) >= 8}
    return sorted(values, key=len, reverse=True)


def _walk(value: Any, change: Callable[[Any, Path_], Any], where: Path_ = ()) -> Any:
    """A copy of a tree with every leaf changed."""
    if isinstance(value, dict):
        return {key: _walk(inner, change, (*where, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_walk(inner, change, (*where, index)) for index, inner in enumerate(value)]
    return change(value, where)
