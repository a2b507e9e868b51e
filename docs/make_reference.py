"""Makes docs/reference/*.md of the YAML files' comments and the schema: `python docs/make_reference.py`.

A test fails where a page is not what this makes, so what it says of a key is what the program does with it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from framework.config import describe, names  # noqa: E402
from framework.config.compose import CONF  # noqa: E402
from framework.config.names import Place  # noqa: E402

OVERLAYS = ("experiment", "sweep", "debug", "local")  # sets of values for one purpose, no keys of their own
NAMED_BY_CHOICE = (["name"], ["kind"], ["engine"])  # GROUP.KEY that say which choice it is
FUNCTION = ("_target_", "_partial_")  # alike in every loss


@dataclass(frozen=True)
class Key:
    """A key as one file, or several alike, have it."""

    name: str
    expected: str
    comment: str
    defaults: dict[str, str]  # by choice; "" for a group of one


def pages() -> dict[str, str]:
    """File name -> Markdown."""
    places = names.places([CONF])
    groups = names.groups([CONF])
    return {
        "keys.md": _keys(places, groups),
        "losses.md": _losses(places, groups["loss"]),
        "experiments.md": _experiments(groups),
    }


def _keys(places: Sequence[Place], groups: dict[str, list[str]]) -> str:
    primary = [p for p in places if p.choice == ""]
    text = [
        "# Every key of the configuration",
        "`python launch/train.py KEY=VALUE GROUP=CHOICE ...` sets any of them. What is typed beats an "
        "experiment, an experiment beats a choice, and a key that does not exist is refused with the nearest "
        "one that does. The losses' own are on a [page of theirs](losses.md).",
        "## The run",
        *_entries(_merged(primary)),
    ]
    for group in _order(groups):
        text += [f"## {group}", *_choices(group, groups[group], places)]
        own = [p for p in places if p.file.parent.name == group and _of_group(p, group)]
        text += _entries(_merged(own), len(groups[group]))
    return _page(text)


def _order(groups: dict[str, list[str]]) -> Iterator[str]:
    """As conf/train.yaml chooses them, without overlays and losses, which have pages of their own."""
    chosen = re.findall(r"^  - (\w+):", (CONF / "train.yaml").read_text(), flags=re.MULTILINE)
    yield from (group for group in chosen if group in groups and group not in (*OVERLAYS, "loss"))


def _of_group(place: Place, group: str) -> bool:
    return place.key.split(".")[0] == group


def _choices(group: str, choices: Sequence[str], places: Sequence[Place]) -> list[str]:
    """What a group offers, and what each choice sets in other groups."""
    if len(choices) == 1:
        return [_head(CONF / group / f"{choices[0]}.yaml")]
    lines = []
    for name in choices:
        line = f"- `{group}={name}`: {_head(CONF / group / f'{name}.yaml')}"
        brought = [p for p in places if p.choice == f"{group}={name}" and not _of_group(p, group) and p.text]
        if brought:
            line += " Brings along: " + ", ".join(f"`{p.key}={p.text}`" for p in brought) + "."
        lines.append(line)
    return ["\n".join(lines)]


def _merged(places: Sequence[Place]) -> list[Key]:
    """Keys in the order of the files; one entry for what several choices say in the same words."""
    found: dict[tuple[str, str], Key] = {}
    for place in places:
        comment = _comment(place)
        if place.text is None and not comment and not _is_list(place):
            continue  # a mapping, whose keys speak for themselves
        key = found.setdefault((place.key, comment), Key(place.key, _expected(place.key), comment, {}))
        key.defaults[place.choice] = _default(place)
    return list(found.values())


def _entries(keys: Sequence[Key], choices: int = 1) -> list[str]:
    """One paragraph a key, of a group of so many choices. Raises ValueError for one that nobody explains."""
    holders: dict[str, int] = {}  # key -> choices that have it, whatever they say of it
    for key in keys:
        holders[key.name] = holders.get(key.name, 0) + len(key.defaults)
    entries = []
    for key in keys:
        if key.name.split(".")[1:] in NAMED_BY_CHOICE and "" not in key.defaults:
            continue
        kinds = set(key.defaults.values())
        if "-" in kinds:
            default = "has to be given"
        elif kinds == {"{}"}:
            default = ""
        elif len(kinds) == 1:
            default = f"default `{kinds.pop()}`"
        else:
            default = "default " + ", ".join(f"`{value}` ({of})" for of, value in key.defaults.items())
        if not key.comment:
            raise ValueError(f"{key.name}: no comment in {', '.join(key.defaults)}")
        facts = "; ".join(filter(None, (key.expected, default, _only(key, holders[key.name], choices))))
        entries.append(f"**`{key.name}`** ({facts}). {key.comment}")
    return entries


def _only(key: Key, holders: int, choices: int) -> str:
    """Which choices of the group an entry is about, where not all."""
    if len(key.defaults) == choices or "" in key.defaults:
        return ""
    return ("only with " if holders < choices else "with ") + ", ".join(f"`{of}`" for of in key.defaults)


def _losses(places: Sequence[Place], choices: Sequence[str]) -> str:
    text = [
        "# Every loss",
        "`loss=NAME` chooses one; its keywords are keys: `loss.beta=0.2`. A loss of your own is one function "
        "and one file like these, see [Extending](../extending.md).",
    ]
    for choice in choices:
        mine = [p for p in places if p.choice == f"loss={choice}"]
        target = next(p.text for p in mine if p.key == "loss._target_")
        text += [f"## {choice}", f"{_head(CONF / 'loss' / f'{choice}.yaml')} `{target}`"]
        text += _entries(_merged([p for p in mine if p.key.split(".")[-1] not in FUNCTION]))
    return _page(text)


def _experiments(groups: dict[str, list[str]]) -> str:
    text = [
        "# Experiments, sweeps and pipelines",
        "Files that bring several settings at once, each with its command.",
    ]
    folders = [*(group for group in ("experiment", "sweep", "debug") if group in groups), "pipeline"]
    for folder in folders:
        text.append(f"## {folder}")
        for file in sorted((CONF / folder).glob("*.yaml")):
            command = _command(file)
            text += [f"### {file.stem}", f"```\n{command}\n```", _head(file)]
    return _page(text)


def _command(file: Path) -> str:
    lines = file.read_text().splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# python"))


def _head(file: Path) -> str:
    """What a file says about itself: the comment it opens with, to the first blank line."""
    lines = []
    for line in file.read_text().splitlines():
        if line.startswith(("# @package", "# python ")):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return _plain(" ".join(lines))


def _comment(place: Place) -> str:
    """What stands above a key, or behind its value."""
    lines = place.file.read_text().splitlines()
    above: list[str] = []
    for line in reversed(lines[: place.line - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("#").strip())
    here = lines[place.line - 1].partition(" # ")[2].strip()
    return _plain(" ".join(above) or here)


def _plain(text: str) -> str:
    """Markdown that shows the words as they stand; what is between backticks is shown so already."""
    parts = text.split("`")
    parts[::2] = (re.sub(r"([|*_])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2])
    return "`".join(parts)


def _default(place: Place) -> str:
    if place.text == "???":
        return "-"
    if place.text is None:
        return _lines_of(place)
    return place.text or '""'


def _lines_of(place: Place) -> str:
    """A value over several lines, or a list of mappings, as it is written."""
    line = place.file.read_text().splitlines()[place.line - 1]
    return line.partition(":")[2].partition(" # ")[0].strip() or "{}"


def _is_list(place: Place) -> bool:
    return _lines_of(place).startswith("[")


def _expected(key: str) -> str:
    words, _ = describe.expected(key.split("."))
    if words.startswith("{"):
        return "the keys below"
    return "" if words == "another value" else _plain(words)


def _page(paragraphs: Sequence[str]) -> str:
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    for name, text in pages().items():
        (ROOT / "docs/reference" / name).write_text(text)
        print(f"docs/reference/{name}")
