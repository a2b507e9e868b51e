"""The images, read: no container engine is needed. What is copied exists, what is installed is locked."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
IMAGES = {"Dockerfile": "requirements-gpu.lock", "Dockerfile.cpu": "requirements-cpu.lock"}
EXTRAS = ("deepspeed", "math")  # of pyproject.toml, in both images
ON_CUDA = ("qlora",)  # and in that one


def instructions(name):
    """(instruction, rest) of a Dockerfile, continued lines joined, comments gone."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def locked(name):
    """Package -> (version, number of hashes)."""
    found = {}
    for part in re.split(r"\n(?=[a-zA-Z0-9])", (DOCKER / name).read_text().partition("\n")[2]):
        package, version = re.match(r"([\w.-]+)==(\S+)", part).groups()
        found[package] = (version, len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", part)))
    return found


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_written_as_it_should_be(name):
    steps = instructions(name)
    stages = [rest for kind, rest in steps if kind == "FROM"]
    for stage in stages:
        image = stage.split()[0]
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?", image), (
            f"no fixed tag: {image}"
        )
    assert [kind for kind, _ in steps].count("ENTRYPOINT") == 1
    last = steps[max(i for i, (kind, _) in enumerate(steps) if kind == "FROM") :]
    users = [rest for kind, rest in last if kind == "USER"]
    assert users == ["sapwood"], "runs as an ordinary user"
    at = last.index(("USER", "sapwood"))
    assert not [rest for kind, rest in last[at:] if kind in ("RUN", "COPY")], "the user owns nothing of it"
    for kind, rest in steps:
        assert kind != "ADD"
        if kind == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest
        if kind == "RUN" and "pip install" in rest:
            ours = "--no-deps" in rest and " -e /opt/sapwood" in rest
            assert ours or "--require-hashes" in rest, rest
    if any("|" in rest for kind, rest in steps if kind == "RUN"):
        assert any(kind == "SHELL" and "pipefail" in rest for kind, rest in steps)


@pytest.mark.parametrize("name", IMAGES)
def test_what_an_image_copies_and_installs_is_there(name):
    copied = set()
    for kind, rest in instructions(name):
        words = shlex.split(rest)
        if kind == "COPY" and not rest.startswith("--from"):
            for source in words[:-1]:
                assert (ROOT / source).exists(), source
                copied.add(Path(source).name)
        if kind == "RUN":
            for lock in re.findall(r"-r /tmp/locks/(\S+)", rest):
                assert lock in copied
    for needed in ("framework", "conf", "launch", "pyproject.toml", "entrypoint.sh", "smoke.py"):
        assert needed in copied
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {metadata["readme"], *metadata["license-files"]} <= copied  # its build reads them
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not copied & set(ignored)


@pytest.mark.parametrize("lock", IMAGES.values())
def test_a_lock_holds_what_the_project_asks_for(lock):
    """Fails when pyproject.toml or constraints.txt has moved on: run docker/lock.sh."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = EXTRAS if "cpu" in lock else (*EXTRAS, *ON_CUDA)
    asked = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
    found = locked(lock)
    for requirement in map(Requirement, asked):
        assert requirement.name in found, f"{requirement} is not locked; run docker/lock.sh"
        version = found[requirement.name][0]
        assert requirement.specifier.contains(Version(version)), f"{requirement}: locked at {version}"
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        package, _, version = line.partition("==")
        if package in found and not line.startswith("#"):
            assert Version(found[package][0]).public == version, f"{package}: run docker/lock.sh"
    assert (found["torch"][0].endswith("+cpu")) == ("cpu" in lock)
    assert any(package.startswith("nvidia-") for package in found) == ("gpu" in lock)


@pytest.mark.parametrize("lock", sorted(path.name for path in DOCKER.glob("*.lock")))
def test_every_package_of_a_lock_has_hashes_and_no_address(lock):
    found = locked(lock)
    assert found
    assert all(hashes > 0 for _, hashes in found.values())
    text = (DOCKER / lock).read_text()
    assert "://" not in text
    assert "index-url" not in text
    assert "find-links" not in text


def test_locks_agree_with_one_another():
    gpu, build = locked("requirements-gpu.lock"), locked("requirements-build.lock")
    for lock in ("requirements-gpu.lock", "requirements-cpu.lock", "requirements-flash.lock"):
        other = locked(lock)
        for package in build.keys() & other.keys():
            assert build[package][0] == other[package][0], f"{package} would be installed twice"
    assert {"setuptools", "wheel", "ninja"} <= build.keys()
    assert locked("requirements-flash.lock")["flash-attn"][0] in (DOCKER / "uv.toml").read_text()
    assert "torch" in gpu


def test_the_entry_point_takes_our_commands(tmp_path):
    """Its choice alone is tried: `python` is a script that says what it was asked for."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)

    def enter(*arguments):
        told = subprocess.run(
            [str(DOCKER / "entrypoint.sh"), *arguments],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        return told.returncode, told.stdout.splitlines(), told.stderr

    assert enter("train", "a=1", "b=[x y]") == (0, [str(ROOT / "launch" / "train.py"), "a=1", "b=[x y]"], "")
    assert enter("smoke") == (0, [str(DOCKER / "smoke.py")], "")
    assert enter("python", "-V")[1] == ["-V"]
    assert enter("sh", "-c", "exit 7")[0] == 7
    status, _, said = enter()
    assert status == 2
    for command in ("train", "pipeline", "evaluate", "export", "generate", "preview", "smoke"):
        assert f" {command} " in said.replace(",", " ")


def test_the_scripts_are_clean():
    for script in ("entrypoint.sh", "lock.sh"):
        assert subprocess.run(["bash", "-n", str(DOCKER / script)]).returncode == 0
        assert (DOCKER / script).stat().st_mode & 0o111
