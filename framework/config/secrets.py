"""What counts as a secret, and text and trees without it.

Secrets belong to the environment. Where one is typed or read all the same it is hidden by the name of its
key, by its place in a URL, by its looks, and wherever else its value turns up: in files, logs and dashboards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

SHORTEST = 6  # characters of a value that is searched for in other text: shorter ones are words

_NAMES = frozenset(
    "key apikey token secret secrets password passwords passwd passphrase pwd credential credentials auth "
    "authorization bearer cookie pat signature sig".split()
)
_ENDINGS = ("password", "passwd", "secret", "apikey", "token")  # PGPASSWORD; `tokens` are counted, not kept
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # api_key, API_KEY and apiKey are api and key

_URL = re.compile(r"\w+://[^\s'\"<>]+")
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_QUERY = re.compile(r"(?<=[?&#;])([\w.%~-]+)=([^&#;\s]+)")
_LOOKS = (
    re.compile(  # Hugging Face, OpenAI and others, GitHub, GitLab, AWS, Slack, HTTP headers, JSON web tokens
        r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
        r"|A[KS]IA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|(?<=Bearer )[\w.~+/-]{8,}=*"
        r"|eyJ[\w-]{8,}\.eyJ[\w-]+\.[\w-]+)"
    )
)
_KEY = re.compile(r"([\w.+~@/-]+)\s*[=:]\s*")
_OPEN, _CLOSE, _QUOTES = "[{(", "]})", "'\""

Place = tuple[str | int, ...]
"""Where a value stands in a tree: keys and indices from the root."""


def named(name: str) -> bool:
    """Whether what is called so is a secret: api_key, HF_TOKEN, hubToken; not max_tokens, not tokenizer."""
    words = [word.lower() for word in _WORD.findall(name)]
    plural = ("api", "keys") in pairwise(words)
    return plural or any(word in _NAMES or word.endswith(_ENDINGS) for word in words)


def hidden(text: str) -> str:
    """What was said, without secrets of the environment, of URLs, and others known by their looks."""
    return _without(text, _of_environment(os.environ))


def typed(text: str) -> str:
    """A KEY=VALUE as it was typed, `hidden` and without values of keys that are named like secrets."""
    kept, at = "", 0
    for start, end in _spans(text):
        kept += text[at:start] + HIDDEN
        at = end
    return hidden(kept + text[at:])


def concealed(tree: Any) -> Any:
    """A copy of a JSON tree, fit for files: without values under a secret's name and what `hidden` hides."""
    return walk(tree, lambda value, where: HIDDEN if _is_secret(value, where) else _plain(value))


def mask(tree: Any, arguments: Iterable[str] = ()) -> Callable[[str], str]:
    """A function that hides in any text what `hidden` does, and secrets of a tree and of a command line."""
    asked = [text[start:end].strip(_QUOTES) for text in arguments for start, end in _spans(text)]
    values = [*_of_environment(os.environ), *_in(tree), *_in(list(arguments)), *asked]
    values = sorted({value for value in values if len(value) >= SHORTEST}, key=len, reverse=True)
    return lambda text: _without(text, values)


def walk(value: Any, change: Callable[[Any, Place], Any], where: Place = ()) -> Any:
    """A copy of a tree with every leaf changed."""
    if isinstance(value, Mapping):
        return {key: walk(inner, change, (*where, key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [walk(inner, change, (*where, index)) for index, inner in enumerate(value)]
    return change(value, where)


def _is_secret(value: Any, where: Place) -> bool:
    """A number under such a name is one only if it is too long for a setting."""
    told = isinstance(value, str) or (type(value) is int and len(str(value)) >= SHORTEST)
    return told and any(isinstance(part, str) and named(part) for part in where)


def _plain(value: Any) -> Any:
    return hidden(value) if isinstance(value, str) else value


def _without(text: str, values: list[str]) -> str:
    for value in values:
        text = text.replace(value, HIDDEN)
    if "://" in text:
        text = _URL.sub(lambda found: _QUERY.sub(_answer, _LOGIN.sub(HIDDEN, found[0])), text)
    return _LOOKS.sub(HIDDEN, text)


def _answer(found: re.Match[str]) -> str:
    return f"{found[1]}={HIDDEN}" if named(unquote(found[1])) else found[0]


def _of_environment(environment: Mapping[str, str]) -> list[str]:
    """Lines of variables named like secrets, longest first. Shorter than 8 they are words, not secrets, and
    a path (PWD, SSH_AUTH_SOCK) says where something is."""
    values = {
        line
        for name, value in environment.items()
        if named(name) and not (value.startswith("/") and os.path.exists(value))
        for line in {value, *value.splitlines()}
        if len(line) >= 8
    }
    return sorted(values, key=len, reverse=True)


def _in(tree: Any) -> Iterator[str]:
    """Every secret value of a tree: under such a name, or in a URL."""
    found: list[str] = []

    def look(value: Any, where: Place) -> None:
        if _is_secret(value, where):
            found.extend(str(value).splitlines())
        elif isinstance(value, str):
            for url in _URL.findall(value):
                for login in _LOGIN.findall(url):
                    found.extend([login, login.partition(":")[2], unquote(login.partition(":")[2])])
                found.extend(answer for name, answer in _QUERY.findall(url) if named(unquote(name)))

    walk(tree, look)
    yield from found


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Where values stand, in a KEY=VALUE as it was typed, whose keys are named like secrets."""
    at = 0
    for found in _KEY.finditer(text):
        begun = found.start()
        in_url = text[:begun].endswith(("?", "&", ";", "#"))  # `hidden` takes those one by one
        if begun >= at and not in_url and any(map(named, re.split(r"[.+~@/]", found[1]))):
            at = _end(text, found.end())
            yield found.end(), at


def _end(text: str, start: int) -> int:
    """Where the value ends that begins at `start`: at the end of its entry, in a list or a mapping."""
    inside = sum(text[:start].count(letter) for letter in _OPEN) > sum(map(text[:start].count, _CLOSE))
    if not inside:
        return len(text)
    depth, quote, at = 0, "", start
    while at < len(text):
        letter = text[at]
        if quote:
            at += letter == "\\"
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPEN:
            depth += 1
        elif depth == 0 and (letter == "," or letter in _CLOSE):
            return at
        elif letter in _CLOSE:
            depth -= 1
        at += 1
    return len(text)
