"""Rows of every supported format, brought to one record: messages with a train flag each, or text.

Pure functions of one row: no file, no tokenizer. A malformed row raises `RowError`, which says what was
found and what was expected; whoever knows the file adds the place and decides between refusing and dropping.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Message:
    """One turn. `train` is true for assistant turns that the data does not exclude."""

    role: str  # system, user, assistant or tool
    content: str
    train: bool
    extra: Mapping[str, Any] = field(
        default_factory=dict
    )  # what templates read besides: tool_calls, name, ...

    def as_template_input(self) -> dict[str, Any]:
        """The dictionary that chat templates expect."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Record:
    """One example: a conversation, or (without messages) a text trained from character `trained_from` on."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    trained_from: int = 0  # characters; 0 trains the whole text, otherwise the length of the prompt


def detect(rows: Sequence[Any]) -> str | None:
    """The format that the first rows agree on by their fields, None when no row has known fields.

    Raises RowError when two rows speak for different formats.
    """
    found: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping) and (name := _format_of(row)) is not None:
            found.setdefault(name, number)
    if len(found) > 1:
        listed = " and ".join(f"{name} (row {number})" for name, number in found.items())
        raise RowError("mixed formats", f"the first rows look like {listed}")
    return next(iter(found), None)


def _format_of(row: Row) -> str | None:
    """A row may carry fields of several formats; the one that says most about turns rules."""
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        turns = row["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else None
        return "messages" if isinstance(first, Mapping) and "role" in first else "sharegpt"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "instruction" in row and "output" in row:
        return "alpaca"
    return "text" if "text" in row else None


def parse(row: Any, format: str) -> Record:
    """The record of one row of the named format (a key of FORMATS).

    Raises RowError for a row that is malformed or has nothing to train on.
    """
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"found {_kind(row)} where an object with fields was expected")
    if not row:
        raise RowError("empty", "the row has no fields")
    return FORMATS[format](row)


def _from_messages(row: Row) -> Record:
    turns = _list(row, "messages" if "messages" in row else "conversations")
    return _conversation([_message(turn, f"messages[{i}]") for i, turn in enumerate(turns)], row)


def _from_prompt_completion(row: Row) -> Record:
    prompt, completion = _present(row, "prompt"), _present(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        for name, value in (("prompt", prompt), ("completion", completion)):
            _not_blank(_text(value, name), name)
        return Record(text=prompt + completion, trained_from=len(prompt))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise RowError(
            "wrong type",
            f"prompt is {_kind(prompt)} and completion is {_kind(completion)}; "
            "expected two strings or two lists of messages",
        )
    before = [_message(turn, f"prompt[{i}]") for i, turn in enumerate(prompt)]
    after = [_message(turn, f"completion[{i}]") for i, turn in enumerate(completion)]
    untrained = [Message(m.role, m.content, False, m.extra) for m in before]
    return _conversation(untrained + after, row)


def _from_alpaca(row: Row) -> Record:
    messages = []
    if row.get("system"):
        messages.append(Message("system", _text(row["system"], "system"), False))
    for i, pair in enumerate(_optional_list(row, "history")):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise RowError("wrong type", f"history[{i}] is {_kind(pair)}; expected [question, answer]")
        messages += _exchange(_text(pair[0], f"history[{i}][0]"), _text(pair[1], f"history[{i}][1]"))
    question = _text(_present(row, "instruction"), "instruction")
    if row.get("input"):
        question += "\n" + _text(row["input"], "input")
    messages += _exchange(question, _text(_present(row, "output"), "output"))
    return _conversation(messages, {})


def _exchange(question: str, answer: str) -> list[Message]:
    return [Message("user", question, False), Message("assistant", answer, True)]


def _from_sharegpt(row: Row) -> Record:
    messages = []
    if row.get("system"):
        messages.append(Message("system", _text(row["system"], "system"), False))
    for i, turn in enumerate(_list(row, "conversations")):
        name = f"conversations[{i}]"
        if not isinstance(turn, Mapping):
            raise RowError("wrong type", f"{name} is {_kind(turn)}; expected an object with from and value")
        speaker = _present(turn, "from", name)
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise RowError(
                "unknown role", f"{name}.from is {speaker!r}; expected one of {', '.join(SPEAKERS)}"
            )
        value = _text(_present(turn, "value", name), f"{name}.value")
        extra: dict[str, Any] = {}
        if speaker == "function_call":
            calls = _json(value, f"{name}.value")
            extra["tool_calls"] = _tool_calls(calls if isinstance(calls, list) else [calls], f"{name}.value")
            value = ""
        messages.append(Message(role, value, role == "assistant", extra))
    return _conversation(messages, row)


SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def _from_text(row: Row) -> Record:
    return Record(text=_not_blank(_text(_present(row, "text"), "text"), "text"))


FORMATS: dict[str, Callable[[Row], Record]] = {
    "messages": _from_messages,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
    "text": _from_text,
}

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name; templates know the older one
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
PASSED_ON = ("name", "tool_call_id", "reasoning_content", "thinking")  # further keys that templates read


def _message(turn: Any, name: str) -> Message:
    """A message in OpenAI's form; `weight` 0 excludes an assistant turn from training."""
    if not isinstance(turn, Mapping):
        raise RowError("wrong type", f"{name} is {_kind(turn)}; expected an object with role and content")
    spoken = _present(turn, "role", name)
    role = ROLES.get(spoken) if isinstance(spoken, str) else None
    if role is None:
        raise RowError("unknown role", f"{name}.role is {spoken!r}; expected one of {', '.join(ROLES)}")
    extra: dict[str, Any] = {}
    for key in PASSED_ON:
        if turn.get(key) is not None:
            extra[key] = _text(turn[key], f"{name}.{key}")
    if turn.get("tool_calls"):
        extra["tool_calls"] = _tool_calls(turn["tool_calls"], f"{name}.tool_calls")
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError("wrong type", f"{name}.weight is {weight!r}; expected 0 or 1")
    content = turn.get("content")
    if content is None and "tool_calls" in extra:
        content = ""
    elif isinstance(content, list):
        content = "".join(_part(part, f"{name}.content[{i}]") for i, part in enumerate(content))
    else:
        content = _present(turn, "content", name)
    return Message(role, _text(content, f"{name}.content"), role == "assistant" and weight != 0, extra)


def _part(part: Any, name: str) -> str:
    if not (isinstance(part, Mapping) and part.get("type", "text") == "text"):
        raise RowError("wrong type", f"{name} is not a text part; only text can be trained on")
    return _text(_present(part, "text", name), f"{name}.text")


def _tool_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Calls as {"type": "function", "function": {"name", "arguments": object}}, which templates expect."""
    if not isinstance(calls, list):
        raise RowError("wrong type", f"{name} is {_kind(calls)}; expected a list of calls")
    normalised = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("wrong type", f"{name}[{i}] has no function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{name}[{i}].arguments") if arguments.strip() else {}
        if not isinstance(arguments, Mapping):
            raise RowError("wrong type", f"{name}[{i}].arguments is {_kind(arguments)}; expected an object")
        _encodable(json.dumps(arguments, ensure_ascii=False, default=str), f"{name}[{i}].arguments")
        kept = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
        normalised.append({"id": call["id"], **kept} if isinstance(call.get("id"), str) else kept)
    return normalised


def _conversation(messages: list[Message], row: Row) -> Record:
    """Check the order of roles: [system] user assistant (tool... assistant)? user ... assistant."""
    if not messages:
        raise RowError("empty", "the conversation has no messages")
    if all(m.role != "assistant" for m in messages):
        raise RowError("no assistant turn", "no assistant turn to train on")
    allowed = {
        "": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "tool": ("tool", "assistant"),
    }
    before = ""
    for i, message in enumerate(messages):
        if message.role not in allowed[before]:
            found = f"a {message.role} message after {before or 'nothing'}"
            raise RowError(
                "role order", f"message {i + 1}: {found}; expected {' or '.join(allowed[before])} there"
            )
        if message.role in ("user", "assistant") and "tool_calls" not in message.extra:
            _not_blank(message.content, f"message {i + 1} ({message.role})")
        before = message.role
        allowed["assistant"] = ("tool",) if "tool_calls" in message.extra else ("user",)
    if before != "assistant":
        raise RowError(
            "role order", f"the last message is of the {before}; expected the assistant's answer at the end"
        )
    if not any(m.train for m in messages):
        raise RowError(
            "no trained turn", "every assistant turn is excluded from training (weight 0 or in prompt)"
        )
    return Record(tuple(messages), _tools(row))


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("wrong type", f"tools is {_kind(tools)}; expected a list of function descriptions")
    _encodable(json.dumps(tools, ensure_ascii=False, default=str), "tools")
    return tuple(tools)


def _present(row: Row, key: str, name: str = "") -> Any:
    full = f"{name}.{key}" if name else key
    if key not in row:
        raise RowError("missing field", f"no field {full}; found {', '.join(map(str, row)) or 'nothing'}")
    if row[key] is None:
        raise RowError("null", f"{full} is null")
    return row[key]


def _list(row: Row, key: str) -> list[Any]:
    value = _present(row, key)
    if not isinstance(value, list):
        raise RowError("wrong type", f"{key} is {_kind(value)}; expected a list")
    return value


def _optional_list(row: Row, key: str) -> list[Any]:
    return _list(row, key) if row.get(key) is not None else []


def _json(value: str, name: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError("wrong type", f"{name} is not JSON: {error}") from None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong type", f"{name} is {_kind(value)}; expected a string")
    return _encodable(value, name)


def _encodable(value: str, name: str) -> str:
    if "\x00" in value:
        raise RowError("NUL character", f"{name} contains a NUL character at {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "lone surrogate", f"{name} contains a lone surrogate (half a character) at {error.start}"
        ) from None
    return value


def _not_blank(value: str, name: str) -> str:
    if not value.strip():
        raise RowError("empty", f"{name} is empty")
    return value


def _kind(value: Any) -> str:
    """What a JSON author would call it."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
