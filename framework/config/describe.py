"""What a key may hold, in words, read from the schema: "a number > 0", "one of ddp, fsdp, zero3"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from framework.config.schema import Run

_BOUNDS = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
_KINDS = {
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}


def expected(where: Sequence[str | int]) -> tuple[str, list[str]]:
    """What the key at `where` holds, and its choices where it is one of a few words."""
    nodes = [_schema()]
    for part in where:
        nodes = [inner for node in nodes for inner in _step(node, part)]
    words = list(dict.fromkeys(word for node in nodes for word in _words(node)))
    allowed = [str(value) for node in nodes for value in _values(node)]
    return " or ".join(words) or "another value", allowed


@cache
def _schema() -> dict[str, Any]:
    return Run.model_json_schema()


def _members(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a node, references followed."""
    if "$ref" in node:
        yield from _members(_schema()["$defs"][node["$ref"].rpartition("/")[2]])
    elif alternatives := node.get("anyOf") or node.get("oneOf"):
        for inner in alternatives:
            yield from _members(inner)
    else:
        yield node


def _step(node: dict[str, Any], part: str | int) -> Iterator[dict[str, Any]]:
    for member in _members(node):
        if isinstance(part, str) and part in member.get("properties", {}):
            yield member["properties"][part]
        elif isinstance(part, int) and part < len(member.get("prefixItems", ())):
            yield member["prefixItems"][part]
        elif isinstance(part, int) and "items" in member:
            yield member["items"]


def _values(node: dict[str, Any]) -> Iterator[Any]:
    for member in _members(node):
        yield from member.get("enum", [member["const"]] if "const" in member else [])


def _words(node: dict[str, Any]) -> Iterator[str]:
    for member in _members(node):
        kind = member.get("type", "")
        bounds = " and ".join(f"{sign} {member[name]}" for name, sign in _BOUNDS if name in member)
        if "enum" in member:
            yield "one of " + ", ".join(map(str, member["enum"]))
        elif "const" in member:
            yield str(member["const"]).lower() if kind == "boolean" else str(member["const"])
        elif kind == "array":
            yield _list(member)
        elif kind == "object":
            yield f"{{{', '.join(_members_of(member))}}}"
        elif "pattern" in member:
            yield f"text of the form {member['pattern'].strip('^$')}"
        else:
            yield f"{_KINDS[kind]} {bounds}".rstrip()


def _members_of(member: dict[str, Any]) -> Iterator[str]:
    """Of an object: its keys, or what a key of any name may hold."""
    yield from (f"{name}: ..." for name in member.get("properties", ()))
    if isinstance(inner := member.get("additionalProperties"), dict):
        yield f"NAME: {' or '.join(_words(inner))}, ..."


def _list(member: dict[str, Any]) -> str:
    if "prefixItems" in member:
        inner = ", ".join(word for item in member["prefixItems"] for word in _words(item))
        return f"a list of {inner}"
    (item,) = _members(member["items"])
    what = "a list of at least one" if member.get("minItems") else "a list of"
    if item.get("type") == "object":
        return f"{what} {{{', '.join(f'{name}: ...' for name in item['properties'])}}}"
    return f"{what} {' or '.join(_words(item))}"
