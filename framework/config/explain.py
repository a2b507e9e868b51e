"""What went wrong in a configuration, in words: what was given, what was expected, what to type.

Two sources of trouble meet here: Hydra, which composes the tree, and pydantic, which validates it.
Their errors say where; the schema, the YAML files and the command line say what was meant.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from framework.config import describe, names
from framework.config.names import Place, nearest
from framework.config.sweeping import INSTALL, mistyped

EXAMPLES = {
    "model.path": "model.path=DIRECTORY_OR_HUB_ID",
    "data.train": "'data.train=[{path: FILE.jsonl}]'",
    "data.eval": "'data.eval=[{path: FILE.jsonl}]'",
    "stage.teacher": "stage.teacher=DIRECTORY_OR_HUB_ID",
}
"""What to type for keys that have no value to start from."""

MEANT = {"model": "model.path={}", "data": "'data.train=[{{path: {}}}]'"}
"""What is meant by a value given to a group that has no such choice."""

ENVIRONMENT = "reward.environment"
"""A class of the user's with keywords that no file lists: each is new to the tree."""

QUOTES = "'\""

OVERLAYS = ("experiment=", "sweep=", "local=", "debug=")
"""Choices that set values for one purpose: no examples for everybody."""


def unreadable(override: str, error: HydraException, directories: Sequence[Path]) -> str:
    """An override that is not KEY=VALUE, or whose value is not in Hydra's grammar."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: expected KEY=VALUE; type {_example(key, names.places(directories))}"
    reason = str(error).splitlines()[0].partition(" expecting ")[0].rstrip(".")
    quoted = shlex.quote(f'{key}="{value.strip(QUOTES)}"')
    return f"{override}: cannot be read ({reason}); if it is text, quote it: type {quoted}"


def _swept(override: Override) -> str:
    """Several values where one run was asked for."""
    key, _, values = (override.input_line or "").partition("=")
    return (
        f"{key}={values}: several values for one run; "
        f"add -m for a run of each, or type {_shell(f'{key}=[{values}]')} for a list"
    )


def missing(keys: Collection[str], directories: Sequence[Path]) -> str:
    """Keys that have to be given and were not."""
    places = names.places(directories)
    return "\n".join(f"{key}: not given; type {_example(key, places)}" for key in sorted(keys))


def composition(error: Exception, overrides: Sequence[str], directories: Sequence[Path]) -> str:
    """Why Hydra could not put the tree together: the first override that is at fault, else its own words."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not readable as YAML: {error.problem}"
    text = str(error)
    groups, places = names.groups(directories), names.places(directories)
    for override in parsed(overrides):
        if (fault := _fault(override, text, groups, places)) is not None:
            return fault
    if key := re.search(r"Could not override 'hydra\.sweeper\.(\w+)'", text):
        return f"hydra.sweeper.{key[1]}: no such key; {mistyped(key[1])}"
    if choice := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        if choice[1] == "hydra/launcher":
            known = "basic, joblib, submitit_local, submitit_slurm"
            return (
                f"hydra/launcher={choice[2]}: not installed; expected one of {known}; "
                f"type {INSTALL} for those besides basic"
            )
        where = re.match(r"In '([^']+)'", text)
        head = f"conf/{where[1]}.yaml: " if where else ""
        return head + _no_choice(choice[1], choice[2], groups)
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def resolution(error: OmegaConfBaseException) -> str:
    """An interpolation such as ${optim.lr} that leads nowhere."""
    reason = str(error.msg or error).splitlines()[0].rstrip(".")
    if variable := re.search(r"Environment variable '[^']+' not found", reason):
        reason = variable[0]
    where = error.full_key or "configuration"
    return f"{where}: {reason}; expected ${{KEY}} of a key that is set, or a plain value"


def parsed(overrides: Sequence[str]) -> list[Override]:
    """The overrides of a command line that Hydra's grammar can read."""
    return OverridesParser.create().parse_overrides(list(overrides))


def _fault(
    override: Override, text: str, groups: Mapping[str, Sequence[str]], places: Sequence[Place]
) -> str | None:
    """What is wrong with one override, or None; `text` is what Hydra said of all of them."""
    given, key = override.input_line or "", override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return None
    if override.is_sweep_override():
        return _swept(override)
    value = override.value()
    if key in groups:
        if override.type == OverrideType.DEL:
            return None
        if value is None:
            return f"{given}: {key} takes one of {', '.join(groups[key])}; leave it out for the default"
        if override.type == OverrideType.ADD and f"Multiple values for {key}" in text:
            return f"{given}: {key} is a choice already; type {_typed(key, override)}"
        wrong = [str(v) for v in (value if isinstance(value, list) else [value]) if str(v) not in groups[key]]
        return f"{given}: {_no_choice(key, wrong[0], groups)}" if wrong else None
    known = _known(places)
    dotted = key.replace("/", ".")
    if "/" in key:
        if dotted in known:
            return f"{given}: a slash chooses a file and a dot sets a key; type {_typed(dotted, override)}"
        close = nearest(dotted, {*known, *groups})
        return f"{given}: no such group" + (f"; type {_typed(close, override)}" if close else "")
    group, _, last = key.rpartition(".")
    if key not in known and last in groups.get(group, ()):
        return f"{given}: {last} is a choice of {group}, not a key; type {group}={last}"
    if ENVIRONMENT in (key, group) and override.type == OverrideType.CHANGE:
        if key not in known:
            close = nearest(key, {name for name in known if name.startswith(f"{ENVIRONMENT}.")})
            instead = f"{_typed(close, override)}, or for a keyword of the class " if close else ""
            return f"{given}: no such key; type {instead}{_shell(f'+{given}')}"
        if isinstance(value, dict) and f"'{key}'" in text:
            return f"{given}: keywords of the class are new to the tree; type {_shell(f'+{given}')}"
    if key not in known:
        return f"{given}: no such key{_instead(key, known, override)}"
    if f"'{key}'" not in text:
        return None
    if override.type == OverrideType.DEL:
        return f"{given}: there is no {key} with what is chosen; leave it out"
    if override.type == OverrideType.ADD:
        return f"{given}: {key} is there already; type {_typed(key, override)}"
    if choices := sorted({place.choice for place in places if place.key == key and place.choice}):
        return (
            f"{given}: there is no {key} with what is chosen; "
            f"type {' or '.join(choices)} and {_typed(key, override)}"
        )
    return None


def _no_choice(group: str, value: str, groups: Mapping[str, Sequence[str]]) -> str:
    choices = groups.get(group)
    if choices is None:
        close = nearest(group, groups)
        return f"no group {group}" + (f"; type {close}={value}" if close else "")
    close = nearest(value, choices)
    type_this = f"type {group}={close}" if close else f"it has {', '.join(choices)}"
    if close is None and group in MEANT:
        type_this += f"; if it is your {group}, type {MEANT[group].format(value)}"
    return f"{group} has no choice {value}; {type_this}"


def validation(
    error: ValidationError, tree: Mapping[str, Any], overrides: Sequence[str], directories: Sequence[Path]
) -> str:
    """One line for each key that the schema refused."""
    places = names.places(directories)
    lines: dict[tuple[str | int, ...], str] = {}
    for detail in error.errors(include_url=False):
        where = tuple(_where(detail, tree))
        if detail["type"] == "pair":
            lines[(*where, detail["msg"])] = detail["msg"]
        elif where not in lines:  # members of a union each have their say; the field is described as a whole
            lines[where] = _line(detail, where, tree, overrides, places)
    # A list whose members are all refused counts as too short besides.
    inner = {where[:depth] for where in lines for depth in range(len(where))}
    return "\n".join(line for where, line in lines.items() if where not in inner)


def _line(
    detail: ErrorDetails,
    where: tuple[str | int, ...],
    tree: Mapping[str, Any],
    overrides: Sequence[str],
    places: Sequence[Place],
) -> str:
    key, value = _dotted(where), detail["input"]
    in_list = any(isinstance(part, int) for part in where)
    if detail["type"] == "extra_forbidden":
        while isinstance(value, dict) and len(value) == 1:  # +optm.lr=1 makes optm: {lr: 1}
            name, value = next(iter(value.items()))
            key = f"{key}.{name}"
        if in_list:
            close = nearest(str(where[-1]), names.source_keys())
            return f"{key}: no such key; type {close}" if close else f"{key}: no such key; remove it"
        known = _known([place for place in places if place.key != key])
        override = _given(key, overrides)
        return f"{_origin(key, value, override, places)}: no such key{_instead(key, known, override)}"
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], str):
        return f"{key}: not set; type {_choice(detail, tree) or _example(key, places)}"
    if detail["type"].startswith("union_tag"):  # a part of the tree whose choice is not known
        tag = detail["ctx"]["discriminator"].strip("'")
        where, value = (*where, tag), value.get(tag) if isinstance(value, dict) else None
    if key not in names.schema_keys() and _dotted(where[:-1]) in names.schema_keys() and not in_list:
        where, key = where[:-1], _dotted(where[:-1])  # within a mapping, which is typed as a whole
    expected, allowed = describe.expected(where)
    text = f"{_origin(key, value, None, places)}: got {_quoted(value)}; expected {expected}"
    if detail["type"].startswith("union_tag"):
        return f"{text}; type {key}={nearest(str(value), allowed) or allowed[0]}"
    if isinstance(value, str) and _is_number(value) and "number" in expected:
        return f"{text}, without quotes; type {key}={value}"
    return f"{text}; type {_example(key, places, value, nearest(str(value), allowed))}"


def _where(detail: ErrorDetails, tree: Mapping[str, Any]) -> list[str | int]:
    """The keys and indices of an error, without the names of union members that pydantic mixes in."""
    node: Any = tree
    where: list[str | int] = []
    for position, part in enumerate(detail["loc"]):
        last = position == len(detail["loc"]) - 1
        if (isinstance(node, Mapping) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]  # type: ignore[index]
            where.append(part)
        elif detail["type"] == "missing" and last and isinstance(part, str):
            where.append(part)
    return where


def _dotted(where: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")


def _choice(detail: ErrorDetails, tree: Mapping[str, Any]) -> str | None:
    """GROUP=CHOICE that brings a missing key, where the choice was made by its name alone."""
    group, *rest = detail["loc"]
    if len(rest) > 1 and rest[0] not in tree.get(str(group), {}):
        return f"{group}={rest[0]}"
    return None


def _given(key: str, overrides: Sequence[str]) -> Override | None:
    """The override that set `key`: by itself, or inside of a mapping or a list."""
    found = None
    for override in parsed(overrides):
        name = override.key_or_group
        inside = key.startswith((f"{name}.", f"{name}[")) and isinstance(override.value(), dict | list)
        if key == name or inside:
            found = override
    return found


def _origin(key: str, value: Any, override: Override | None, places: Sequence[Place]) -> str:
    """Where a key came from: as it was typed, or a file and line, or the key alone."""
    if override is not None:
        return override.input_line or key
    for place in places:
        if place.key == key and (place.text is None or place.text == str(value)):
            return f"{place}: {key}"
    return key


def _instead(key: str, known: Collection[str], override: Override | None) -> str:
    if (close := nearest(key, known)) is not None:
        return f"; type {close if override is None else _typed(close, override)}"
    parent = key.rpartition(".")[0]
    prefix = f"{parent}." if parent in known else ""
    beside = sorted(name for name in known if name.startswith(prefix) and "." not in name[len(prefix) :])
    return f"; expected one of {', '.join(beside)}"


def _typed(key: str, override: Override) -> str:
    """The same override for another key."""
    _, equals, value = (override.input_line or "").partition("=")
    return _shell(f"{key}={value}") if equals else key


def _example(key: str, places: Sequence[Place], got: object = None, close: str | None = None) -> str:
    """An override of `key` that is accepted: the nearest choice, else the value in its YAML file."""
    if close is not None:
        return f"{key}={close}"
    if (whole := key.partition("[")[0]) != key:
        return _example(whole, places)
    if key in EXAMPLES:
        return EXAMPLES[key].replace("FILE.jsonl", got) if isinstance(got, str) and got else EXAMPLES[key]
    for place in sorted(places, key=lambda place: place.choice.startswith(OVERLAYS)):
        if place.key == key and place.text not in (None, "", "???", "null", str(got)):
            return _shell(f"{key}={place.text}")
    return f"{key}=VALUE"


def _shell(text: str) -> str:
    """`text` so that a shell hands it over whole."""
    return shlex.quote(text) if re.search(r"[^\w=.,:/~@%+-]", text) else text


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _known(places: Sequence[Place]) -> set[str]:
    """Keys of the schema, and keywords of losses, which only YAML files and functions know."""
    return {*names.schema_keys(), *(place.key for place in places if place.key.startswith("loss."))}


def _places(directories: Sequence[Path]) -> list[Place]:
    return names.places(directories)
