"""The documentation: made pages are current, links lead somewhere, commands can be typed."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from framework.config import names
from framework.config.compose import CONF, check

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PAPERS = [*PAGES, ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]


def relative(path):
    return path.relative_to(ROOT).as_posix()


sys.path.insert(0, str(DOCS))
import make_reference  # noqa: E402

REFERENCE = make_reference.pages()


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_pages_of_the_reference_are_what_the_files_say(name):
    """Run `python docs/make_reference.py` after a change in conf/ or of the schema."""
    assert (DOCS / "reference" / name).read_text() == REFERENCE[name]


def test_the_reference_has_every_key_with_its_comment():
    text = REFERENCE["keys.md"] + REFERENCE["losses.md"]
    keys = {
        key for key in names.schema_keys() if not key.startswith(("loss", "evaluate.score.", "retain.score."))
    }
    leaves = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    chosen = {"stage.name", "strategy.name", "schedule.name", "adapter.kind", "rollout.engine"}
    missing = [key for key in sorted(leaves - chosen) if f"**`{key}`**" not in text]
    assert not missing
    assert "**`loss.beta`**" in text


def of_nav(entries):
    for entry in entries:
        for value in entry.values():
            yield from of_nav(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation():
    found = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(of_nav(found)) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("path", PAPERS, ids=relative)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if not link.startswith(("http://", "https://")):
            assert (path.parent / link).exists(), link


STARTERS = ("python", "torchrun", "deepspeed", "PYTHONPATH=.")


def commands(path):
    """Lines of code blocks that start one of our programs, continued lines joined."""
    text = path.read_text().replace("\\\n", " ")
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if "launch/" in line and line.split()[0] in STARTERS:
                yield line


LINES = [(path, line) for path in PAPERS for line in commands(path)]


@pytest.mark.parametrize(("path", "line"), LINES, ids=[relative(path) for path, _ in LINES])
def test_commands_name_what_exists(path, line):
    """The program, its groups and choices, its keys."""
    words = shlex.split(line, comments=True)
    program = next(word for word in words if word.startswith("launch/"))
    assert (ROOT / program).is_file()
    if program != "launch/train.py":
        return
    groups, keys = names.groups([CONF]), names.schema_keys()
    for word in words[words.index(program) + 1 :]:
        key, equals, value = word.partition("=")
        if not equals or word.startswith("-") or key.startswith("hydra"):
            continue
        if key in groups:
            assert value in groups[key] or set(value.split(",")) <= set(groups[key]), word
        else:
            free = key.startswith(("+", "loss.", "reward.environment."))
            assert free or key in keys or key in ("...",), word


WHOLE = [
    (path, line)
    for path, line in LINES
    if line.startswith("python launch/train.py")
    and "..." not in line
    and "-m" not in shlex.split(line, comments=True)
]


@pytest.mark.parametrize(("path", "line"), WHOLE, ids=[relative(path) for path, _ in WHOLE])
def test_whole_commands_would_be_accepted(path, line):
    """As far as can be said without their files: what is typed composes and passes the schema."""
    _, _, *argv = shlex.split(line, comments=True)
    if any("my_package" in word or "mypackage" in word for word in argv):
        pytest.skip("needs a package of the user's")
    check(argv)
