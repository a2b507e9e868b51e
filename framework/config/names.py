"""Every name the configuration knows, and the one nearest to what was typed.

Keys come from the schema, choices and places from the YAML files; only error messages need them, so
nothing here is computed while things go well.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from framework.config.nodes import Source
from framework.config.schema import Run


@dataclass(frozen=True)
class Place:
    """Where a YAML file sets a key."""

    key: str  # dotted, in the composed tree
    file: Path
    line: int  # 1-based
    choice: str  # how the file is chosen: "adapter=lora"; "" for the primary config
    text: str | None  # the value as written; None for a mapping

    def __str__(self) -> str:
        return f"{self.file.parent.name}/{self.file.name}:{self.line}"


def nearest(word: str, known: Collection[str]) -> str | None:
    """The name most like `word`, or None when none is. A name whose last part fits counts as near."""
    parent, _, last = word.lower().rpartition(".")

    def likeness(name: str) -> float:
        beside, _, tail = name.lower().rpartition(".")
        ends = difflib.SequenceMatcher(None, last, tail).ratio()
        if beside == parent and parent:  # what they share by standing together says nothing
            return 0.3 + 0.7 * ends
        whole = difflib.SequenceMatcher(None, word.lower(), name.lower()).ratio()
        return max(whole, 0.9 * ends) + 0.1 * whole

    best = max(sorted(known), key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.65 else None


@cache
def schema_keys() -> frozenset[str]:
    """Every dotted key that the schema has, under any choice, parents included."""
    return frozenset(_fields(Run, ""))


def _fields(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key
        for inner in _models(field.annotation):
            yield from _fields(inner, f"{key}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models a field may hold, through unions and None but not through lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _models(member)


def source_keys() -> frozenset[str]:
    """Keys of one source of data, which stand in a list."""
    return frozenset(Source.model_fields)


def groups(directories: Sequence[Path]) -> dict[str, list[str]]:
    """Names of the choices of every group, sorted; groups of groups have a slash in their name."""
    found: dict[str, set[str]] = {}
    for directory in directories:
        for file in _files(directory):
            if file.parent != directory:
                found.setdefault(file.parent.relative_to(directory).as_posix(), set()).add(file.stem)
    return {group: sorted(choices) for group, choices in sorted(found.items())}


def places(directories: Sequence[Path]) -> list[Place]:
    """Every key that any YAML file of ours or the user's sets. Files that cannot be read are left out."""
    return [
        place
        for directory in directories
        for file in sorted(_files(directory))
        for place in _places_of(file, directory)
    ]


def pipelines(directories: Sequence[Path]) -> list[str]:
    """Names of the chains that `launch/pipeline.py experiment=NAME` can run, sorted."""
    return sorted(
        {file.stem for directory in directories for file in (directory / "pipeline").glob("*.yaml")}
    )


def _files(directory: Path) -> Iterator[Path]:
    """YAML files of one stage of training; those of pipelines belong to another command."""
    for file in directory.rglob("*.yaml"):
        if file.relative_to(directory).with_suffix("").parts[0] != "pipeline":
            yield file


def _places_of(file: Path, directory: Path) -> Iterator[Place]:
    text = file.read_text(encoding="utf-8")
    group = file.parent.relative_to(directory).as_posix()
    header = re.match(r"\s*#\s*@package\s+(\S+)", text)
    if group == ".":
        prefix, choice = "", ""
    else:
        package = header[1] if header else group.replace("/", ".")
        prefix, choice = ("" if package == "_global_" else f"{package}."), f"{group}={file.stem}"
    try:
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return
    yield from _walk(root, prefix, file, choice)


def _walk(node: yaml.Node | None, prefix: str, file: Path, choice: str) -> Iterator[Place]:
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        if key in ("defaults", "hydra"):
            continue
        yield Place(key, file, name.start_mark.line + 1, choice, _text(value))
        yield from _walk(value, f"{key}.", file, choice)


def _text(value: yaml.Node) -> str | None:
    if isinstance(value, yaml.ScalarNode):
        return str(value.value)
    if isinstance(value, yaml.SequenceNode) and all(isinstance(v, yaml.ScalarNode) for v in value.value):
        return f"[{', '.join(v.value for v in value.value)}]"
    return None
