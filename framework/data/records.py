"""Rows of conversations and texts, brought to one record: messages with a train flag each, or text.

Pure functions of one row: no file, no tokenizer. A malformed row raises `RowError`, which says what was
found and what was expected; whoever knows the file adds the place and decides between refusing and dropping.
Rows that compare answers are `data.preferences`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from framework.data.fields import (
    Row,
    RowError,
    an_object,
    encodable,
    from_json,
    kind_of,
    list_of,
    not_blank,
    optional_list,
    present,
    text_of,
)


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


def parse(row: Any, format: str) -> Record:
    """The record of one row of the named format (a key of FORMATS).

    Raises RowError for a row that is malformed or has nothing to train on.
    """
    return FORMATS[format](an_object(row))


def parse_prompt(row: Any, format: str) -> Record:
    """What an answer is asked for (format: a key of PROMPTS): nothing in it is trained.

    Of rows that have an answer, everything before the last assistant turn. Raises RowError.
    """
    return PROMPTS[format](an_object(row))


def _from_messages(row: Row) -> Record:
    return conversation(_turns(row), row)


def _turns(row: Row) -> list[Message]:
    name = "messages" if "messages" in row else "conversations"
    return messages_of(list_of(row, name), name)


def _from_prompt_completion(row: Row) -> Record:
    prompt, completion = present(row, "prompt"), present(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        for name, value in (("prompt", prompt), ("completion", completion)):
            not_blank(text_of(value, name), name)
        return Record(text=prompt + completion, trained_from=len(prompt))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise RowError(
            "wrong type",
            f"prompt is {kind_of(prompt)} and completion is {kind_of(completion)}; "
            "expected two strings or two lists of messages",
        )
    return conversation(
        [*untrained(messages_of(prompt, "prompt")), *messages_of(completion, "completion")], row
    )


def _from_alpaca(row: Row) -> Record:
    messages = []
    if row.get("system"):
        messages.append(Message("system", text_of(row["system"], "system"), False))
    for i, pair in enumerate(optional_list(row, "history")):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise RowError("wrong type", f"history[{i}] is {kind_of(pair)}; expected [question, answer]")
        messages += _exchange(text_of(pair[0], f"history[{i}][0]"), text_of(pair[1], f"history[{i}][1]"))
    question = text_of(present(row, "instruction"), "instruction")
    if row.get("input"):
        question += "\n" + text_of(row["input"], "input")
    messages += _exchange(question, text_of(present(row, "output"), "output"))
    return conversation(messages, {})


def _exchange(question: str, answer: str) -> list[Message]:
    return [Message("user", question, False), Message("assistant", answer, True)]


def _from_sharegpt(row: Row) -> Record:
    return conversation(_spoken(row), row)


def _spoken(row: Row) -> list[Message]:
    messages = []
    if row.get("system"):
        messages.append(Message("system", text_of(row["system"], "system"), False))
    for i, turn in enumerate(list_of(row, "conversations")):
        name = f"conversations[{i}]"
        if not isinstance(turn, Mapping):
            raise RowError("wrong type", f"{name} is {kind_of(turn)}; expected an object with from and value")
        speaker = present(turn, "from", name)
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise RowError(
                "unknown role", f"{name}.from is {speaker!r}; expected one of {', '.join(SPEAKERS)}"
            )
        value = text_of(present(turn, "value", name), f"{name}.value")
        extra: dict[str, Any] = {}
        if speaker == "function_call":
            calls = from_json(value, f"{name}.value")
            extra["tool_calls"] = _tool_calls(calls if isinstance(calls, list) else [calls], f"{name}.value")
            value = ""
        messages.append(Message(role, value, role == "assistant", extra))
    return messages


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
    return Record(text=not_blank(text_of(present(row, "text"), "text"), "text"))


FORMATS: dict[str, Callable[[Row], Record]] = {
    "messages": _from_messages,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
    "text": _from_text,
}


def _asked(row: Row) -> Record:
    prompt = present(row, "prompt")
    if isinstance(prompt, str):
        return Record(text=not_blank(text_of(prompt, "prompt"), "prompt"), trained_from=len(prompt))
    if not isinstance(prompt, list):
        raise RowError("wrong type", f"prompt is {kind_of(prompt)}; expected a string or a list of messages")
    return _question(messages_of(prompt, "prompt"), row)


PROMPTS: dict[str, Callable[[Row], Record]] = {
    "messages": lambda row: _question(_turns(row), row),
    "sharegpt": lambda row: _question(_spoken(row), row),
    "prompt": _asked,
    "prompt_completion": _asked,
    "alpaca": lambda row: _question(list(_from_alpaca(row).messages), {}),
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


def messages_of(turns: Sequence[Any], name: str) -> list[Message]:
    """Messages of a list that refusals call `name`."""
    return [message_of(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]


def untrained(messages: Sequence[Message]) -> list[Message]:
    """The same turns as context only."""
    return [replace(message, train=False) for message in messages]


def message_of(turn: Any, name: str) -> Message:
    """A message in OpenAI's form; `weight` 0 excludes an assistant turn from training."""
    if not isinstance(turn, Mapping):
        raise RowError("wrong type", f"{name} is {kind_of(turn)}; expected an object with role and content")
    spoken = present(turn, "role", name)
    role = ROLES.get(spoken) if isinstance(spoken, str) else None
    if role is None:
        raise RowError("unknown role", f"{name}.role is {spoken!r}; expected one of {', '.join(ROLES)}")
    extra: dict[str, Any] = {}
    for key in PASSED_ON:
        if turn.get(key) is not None:
            extra[key] = text_of(turn[key], f"{name}.{key}")
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
        content = present(turn, "content", name)
    return Message(role, text_of(content, f"{name}.content"), role == "assistant" and weight != 0, extra)


def _part(part: Any, name: str) -> str:
    if not (isinstance(part, Mapping) and part.get("type", "text") == "text"):
        raise RowError("wrong type", f"{name} is not a text part; only text can be trained on")
    return text_of(present(part, "text", name), f"{name}.text")


def _tool_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Calls as {"type": "function", "function": {"name", "arguments": object}}, which templates expect."""
    if not isinstance(calls, list):
        raise RowError("wrong type", f"{name} is {kind_of(calls)}; expected a list of calls")
    normalised = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("wrong type", f"{name}[{i}] has no function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = from_json(arguments, f"{name}[{i}].arguments") if arguments.strip() else {}
        if not isinstance(arguments, Mapping):
            raise RowError("wrong type", f"{name}[{i}].arguments is {kind_of(arguments)}; expected an object")
        encodable(json.dumps(arguments, ensure_ascii=False, default=str), f"{name}[{i}].arguments")
        kept = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
        normalised.append({"id": call["id"], **kept} if isinstance(call.get("id"), str) else kept)
    return normalised


def conversation(messages: Sequence[Message], row: Row) -> Record:
    """A conversation that ends in an answer to train on, with the row's tools. Raises RowError."""
    if not messages:
        raise RowError("empty", "the conversation has no messages")
    if all(m.role != "assistant" for m in messages):
        raise RowError("no assistant turn", "no assistant turn to train on")
    _check_order(messages)
    if messages[-1].role != "assistant":
        raise RowError(
            "role order",
            f"the last message is of the {messages[-1].role}; expected the assistant's answer at the end",
        )
    if not any(m.train for m in messages):
        raise RowError(
            "no trained turn", "every assistant turn is excluded from training (weight 0 or in prompt)"
        )
    return Record(tuple(messages), _tools_of(row))


def _question(messages: Sequence[Message], row: Row) -> Record:
    """A conversation up to where the assistant is to answer: without its last answer, if it has one."""
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not messages:
        raise RowError("empty", "there is no message to answer")
    _check_order(messages)
    if messages[-1].role not in ("user", "tool"):
        raise RowError(
            "role order",
            f"the prompt ends with a message of the {messages[-1].role}; expected the user's, to be answered",
        )
    return Record(tuple(untrained(messages)), _tools_of(row))


def _check_order(messages: Sequence[Message]) -> None:
    """[system] user assistant (tool... assistant)? user ..., and nobody says nothing."""
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
            not_blank(message.content, f"message {i + 1} ({message.role})")
        before = message.role
        allowed["assistant"] = ("tool",) if "tool_calls" in message.extra else ("user",)


def _tools_of(row: Row) -> tuple[Mapping[str, Any], ...]:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = from_json(tools, "tools") if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("wrong type", f"tools is {kind_of(tools)}; expected a list of function descriptions")
    encodable(json.dumps(tools, ensure_ascii=False, default=str), "tools")
    return tuple(tools)
