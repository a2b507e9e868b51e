"""Reading one field of a row: what is there, or a refusal that names the field, what was found and expected.

Pure functions of one row; every format is made of them. Whoever knows the file adds the place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


class RowError(ValueError):
    """A row that cannot be trained on. `reason` is a short stable key to count by, `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


def an_object(row: Any) -> Row:
    """The row itself, which must be an object with fields."""
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"found {kind_of(row)} where an object with fields was expected")
    if not row:
        raise RowError("empty", "the row has no fields")
    return row


def present(row: Row, key: str, name: str = "") -> Any:
    full = f"{name}.{key}" if name else key
    if key not in row:
        raise RowError("missing field", f"no field {full}; found {', '.join(map(str, row)) or 'nothing'}")
    if row[key] is None:
        raise RowError("null", f"{full} is null")
    return row[key]


def list_of(row: Row, key: str) -> list[Any]:
    value = present(row, key)
    if not isinstance(value, list):
        raise RowError("wrong type", f"{key} is {kind_of(value)}; expected a list")
    return value


def optional_list(row: Row, key: str) -> list[Any]:
    return list_of(row, key) if row.get(key) is not None else []


def from_json(value: str, name: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError("wrong type", f"{name} is not JSON: {error}") from None


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong type", f"{name} is {kind_of(value)}; expected a string")
    return encodable(value, name)


def encodable(value: str, name: str) -> str:
    if "\x00" in value:
        raise RowError("NUL character", f"{name} contains a NUL character at {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "lone surrogate", f"{name} contains a lone surrogate (half a character) at {error.start}"
        ) from None
    return value


def not_blank(value: str, name: str) -> str:
    if not value.strip():
        raise RowError("empty", f"{name} is empty")
    return value


def kind_of(value: Any) -> str:
    """What a JSON author would call it."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
