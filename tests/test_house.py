"""The plan of the house, read off the source: who imports whom, one home per library, nothing dangerous."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORK = sorted((ROOT / "framework").rglob("*.py"))
LAUNCH = sorted((ROOT / "launch").rglob("*.py"))

EVERYWHERE = ("framework.errors", "framework.keyed")
ROOMS = {
    "config": ("framework",),
    "train": ("batch", "losses.items", "stages.base", "strategy.base", "strategy.world", "track.base"),
    "stages": ("batch", "losses", "rollout.base", "rollout.experience", "strategy.base"),
    "models": ("batch", "losses.logprobs", "losses.candidates", "losses.whole", "strategy.base"),
    "data": ("batch",),
    "rollout": ("batch",),
    "strategy": ("batch",),
    "cluster": ("strategy.world",),
    "losses": ("batch",),
    "track": (),
}
"""Room -> what it may import of ours besides itself. `strategy.base` holds types and no code."""

HOMES = {
    "torch.distributed": ("strategy/", "cluster/"),
    "deepspeed": ("strategy/", "cluster/"),
    "bitsandbytes": ("models/nf4.py",),
    "torchao": ("strategy/fp8.py",),
    "vllm": ("rollout/vllm.py",),
    "wandb": ("track/wandb.py",),
    "tensorboard": ("track/tensorboard.py",),
    "torch.utils.tensorboard": ("track/tensorboard.py",),
    "peft": ("models/adapters.py",),
    "datasets": ("data/sources.py",),
    "reasoning_gym": ("data/tasks.py",),
    "math_verify": ("rollout/rewards.py",),
    "optuna": ("config/search.py",),
    "hydra": ("config/",),
    "omegaconf": ("config/",),
    "pydantic": ("config/",),
    "matplotlib": ("track/",),
}

LIMIT = 400  # lines; a longer file holds a second idea


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, wherever in the file; relative ones made absolute.

    `from a import b` gives a.b: b may be a module, and an allowed prefix matches either way.
    """
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def within(name: str, *places: str) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def place(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_rooms_import_only_what_the_plan_allows():
    found = []
    for path in FRAMEWORK:
        parts = path.relative_to(ROOT / "framework").parts
        allowed = [*EVERYWHERE, "framework.losses.items"] if len(parts) == 1 else list(EVERYWHERE)
        if len(parts) > 1:
            own = parts[0]
            allowed += [f"framework.{own}", *(f"framework.{p}" for p in ROOMS[own] if p != "framework")]
            allowed += ["framework"] if "framework" in ROOMS[own] else []
        for line, name in imports(path):
            if within(name, "framework") and not within(name, *allowed):
                found.append(f"{place(path, line)} imports {name}")
    assert not found, "\n".join(found)


def test_every_room_is_in_the_plan():
    rooms = {path.parent.name for path in FRAMEWORK if path.parent != ROOT / "framework"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_the_page_on_the_house_names_every_file_of_a_room(room):
    """ARCHITECTURE.md's table of rooms is what a reader finds a file by."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `{room}/` |"))
    files = {path.stem for path in FRAMEWORK if path.parent.name == room} - {"__init__"}
    assert files <= set(re.findall(r"`(\w+)`", row)), files - set(re.findall(r"`(\w+)`", row))


def test_losses_stand_on_torch_alone():
    allowed = ("framework", "torch", *sys.stdlib_module_names)
    found = [
        f"{place(path, line)} imports {name}"
        for path in FRAMEWORK
        if path.parent.name == "losses"
        for line, name in imports(path)
        if not within(name, *allowed)
    ]
    assert not found, "\n".join(found)


def test_every_foreign_library_has_one_home():
    found = []
    for path in FRAMEWORK:
        inside = path.relative_to(ROOT / "framework").as_posix()
        for line, name in imports(path):
            for library, homes in HOMES.items():
                if within(name, library) and not inside.startswith(homes):
                    found.append(f"{place(path, line)} imports {name}, whose home is {' or '.join(homes)}")
    assert not found, "\n".join(found)


def test_entry_points_take_only_their_own_foreign_libraries():
    """launch/ composes: hydra and the terminal are its own, everything else comes through a room."""
    closed = [library for library in HOMES if library not in ("hydra", "omegaconf")]
    found = [
        f"{place(path, line)} imports {name}"
        for path in LAUNCH
        for line, name in imports(path)
        if within(name, *closed)
    ]
    assert not found, "\n".join(found)


def test_importing_the_package_imports_no_torch():
    code = "import sys, framework; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", [*FRAMEWORK, *LAUNCH], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LIMIT, f"{place(path)} has {lines} lines; look for its second idea"


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of code that runs what a file or a string says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if any(within(name, "pickle", "cPickle", "dill", "cloudpickle", "shelve") for name in names):
                yield node.lineno, "pickle"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if called in ("eval", "exec"):
                yield node.lineno, called
            if (
                called == "torch.load"
                and ast.unparse(keywords.get("weights_only", ast.Constant(0))) != "True"
            ):
                yield node.lineno, "torch.load without weights_only=True"
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield node.lineno, called
            if ast.unparse(keywords.get("trust_remote_code", ast.Constant(False))) != "False":
                yield node.lineno, "trust_remote_code"
            if called.startswith(("os.system", "os.popen")) or (
                "shell" in keywords and ast.unparse(keywords["shell"]) == "True"
            ):
                yield node.lineno, "a shell"


def test_nothing_read_from_outside_is_ever_run():
    found = [
        f"{place(path, line)}: {what}"
        for path in [*FRAMEWORK, *LAUNCH]
        for line, what in dangers(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "pickle"),
        ("AutoModel.from_pretrained(x, trust_remote_code=asked)", "trust_remote_code"),
        ("from pickle import loads", "pickle"),
        ("eval(text)", "eval"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("yaml.load(text)", "yaml.load"),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", "trust_remote_code"),
        ("subprocess.run(line, shell=True)", "a shell"),
    ],
)
def test_the_search_for_dangers_finds_them(code, what):
    assert [found for _, found in dangers(ast.parse(code))] == [what]


def test_the_search_for_dangers_lets_safe_code_be():
    safe = (
        "torch.load(p, weights_only=True); model.eval(); yaml.safe_load(t); load(p, trust_remote_code=False)"
    )
    assert not list(dangers(ast.parse(safe)))


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_no_two_test_files_have_one_name():
    """Directories of tests are no packages: of two modules of one name pytest and the workers import one."""
    seen: dict[str, list[Path]] = {}
    for path in TESTS:
        if path.name != "conftest.py" and not path.name.startswith("program_"):  # those are started by path
            seen.setdefault(path.name, []).append(path)
    twice = {name: paths for name, paths in seen.items() if len(paths) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(map(place, paths))}" for name, paths in twice.items())


def test_tests_import_helpers_of_their_own_room_or_of_all():
    """A helper of another room is found only if that room was collected before, so not by every worker."""
    homes = {path.stem: path.parent for path in TESTS if not path.name.startswith(("test_", "program_"))}
    found = [
        f"{place(path, line)} imports {name} of {homes[name.split('.')[0]].name}"
        for path in TESTS
        for line, name in imports(path)
        if (home := homes.get(name.split(".")[0])) and home not in (path.parent, ROOT / "tests")
    ]
    assert not found, "\n".join(found)
