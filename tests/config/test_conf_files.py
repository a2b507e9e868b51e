"""The files in conf/: each composes and binds, each key is explained, known to the schema and read."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from framework.config import names, targets
from framework.config.compose import CONF, check, compose
from framework.config.nodes import RewardFunction
from framework.config.schema import Run

GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]"]
FILES = sorted(CONF.rglob("*.yaml"))
GROUPS = names.groups([CONF])
POLICY_GRADIENTS = (
    "ppo grpo dr_grpo dapo gspo gmpo cispo sapo rloo reinforce reinforce_plus_plus".split()
)  # fmt: skip
TEXT = "replay.sources=[{path: general.jsonl}]"
ONLINE = ["stage=grpo", "reward=verifier"]
TAUGHT = ["stage=distill", "stage.teacher=some/teacher"]
NEEDED = {  # what a choice asks for besides
    "replay=fixed": [TEXT],
    "replay=budget": [TEXT],
    "replay=start": [TEXT],
    "protect=ewc": ["protect.sources=[{path: general.jsonl}]"],
    "protect=interpolate": ["replay.max_forgetting=0.05"],
    "replay=gradient": [TEXT, "stage=preference"],
    "replay=term": [TEXT, "stage=preference"],
    "stage=ppo": ["reward=verifier"],
    "stage=grpo": ["reward=verifier"],
    "stage=distill": TAUGHT[1:],
    "experiment=on_policy_distillation": ["stage.reference_path=some/teacher"],
    "experiment=gkd": ["stage.teacher=some/teacher"],
    "reward=model": ["reward.model=some/model"],
    "reward=environment": ["stage=grpo", "data.train=[]", "+reward.environment.family=basic_arithmetic"],
    "loss=sft": [],
    "loss=dft": [],
    "loss=flow": [],
    "loss=stm": [],
    "loss=reward": ["stage=reward"],
    **{f"loss={name}": TAUGHT for name in ("forward_kl", "reverse_kl", "jsd")},
    **{f"loss={name}": ONLINE for name in POLICY_GRADIENTS},
}


def needed(group, choice):
    """Losses that are not named above are of preferences."""
    return NEEDED.get(f"{group}={choice}", ["stage=preference"] if group == "loss" else [])


CHOICES = [(group, choice) for group, choices in GROUPS.items() for choice in choices if group != "local"]


def relative(path):
    return path.relative_to(CONF).as_posix()


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{g}={c}" for g, c in CHOICES])
def test_every_choice_composes_and_binds(group, choice):
    run = compose([*GIVEN, f"{group}={choice}", *needed(group, choice)])
    targets.loss(run)
    targets.rewards(run)


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.parent.name in ("experiment", "debug", "sweep")], ids=relative
)
def test_the_command_in_the_head_of_a_file_works(path):
    """The second line, under Hydra's package line, is the exact command; it chooses the file itself."""
    package, line = path.read_text().splitlines()[:2]
    assert package == "# @package _global_"
    start, *argv = shlex.split(line.removeprefix("# ").removeprefix("python "))
    assert start == "launch/train.py"
    assert f"{path.parent.name}={path.stem}" in argv
    check(argv)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_file_says_what_it_is_for(path):
    lines = path.read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    said = [line for line in head if not line.startswith(("# @package", "# python "))]
    assert said, f"{path} has no sentence about itself"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_key_has_a_comment(path):
    """A comment above the key, or behind its value. Mappings explain themselves by their keys."""
    lines = path.read_text().splitlines()
    bare = []
    for number, line in enumerate(lines):
        key = re.match(r"\s*(- )?(override )?([\w/. ]+):(\s|$)", line)
        if key is None or line.lstrip().startswith("#"):
            continue
        mapping = line.split("#")[0].rstrip().endswith(":")
        explained = " # " in line or lines[number - 1].lstrip().startswith("#")
        in_defaults = line.startswith("  - ")  # a choice, which its own file explains
        if not (mapping or explained or in_defaults):
            bare.append(f"{number + 1}: {line}")
    assert not bare


def leaves(model_keys):
    return {key for key in model_keys if not any(other.startswith(f"{key}.") for other in model_keys)}


def test_schema_and_files_know_the_same_keys():
    """Keywords of a function are its own; everything else is in both, or in neither."""
    free = ("loss", "evaluate.score.", "retain.score.")
    in_files = {place.key for place in names.places([CONF]) if not place.key.startswith(free)}
    in_schema = {key for key in names.schema_keys() if not key.startswith(free)}
    assert leaves(in_schema) - in_files == set()
    assert in_files - in_schema == set()


def test_the_schema_holds_no_value_of_its_own():
    """Defaults stand in YAML; only members of lists, which have none, bring theirs."""
    with_default = []

    def look(model, where):
        for name, field in model.model_fields.items():
            if not field.is_required():
                with_default.append(f"{where}{name}")
            for inner in names._models(field.annotation):
                if inner is not RewardFunction:  # a member of a list as a rule
                    look(inner, f"{where}{name}.")

    look(Run, "")
    assert with_default == []


def test_names_of_groups_name_themselves():
    """`strategy=fsdp` must choose the file that says name: fsdp."""
    for group, key in (("strategy", "name"), ("schedule", "name"), ("stage", "name"), ("adapter", "kind")):
        for choice in GROUPS[group]:
            tree = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
            assert tree.get(group, tree)[key] == choice


def test_a_result_leaves_nothing_of_hydra_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose([*GIVEN, "experiment=lora", "debug=tiny"])
    assert list(tmp_path.iterdir()) == []


GENERIC = {"name", "path", "every"}  # words that stand everywhere: they count only behind their parent's
READ_HERE = {
    "loss._target_",
    "loss._partial_",
    "trusted_packages",
    "name",
    "adapter.kind",
}  # by the room itself


def test_every_key_is_read():
    """Each leaf of the schema is named somewhere outside the files that only check it."""
    root = CONF.parent
    checkers = {"schema", "compose", "describe", "explain", "names", "record", "settle", "targets"}
    text = "\n".join(
        path.read_text()
        for folder in ("framework", "launch")
        for path in sorted((root / folder).rglob("*.py"))
        if not (path.parent.name == "config" and path.stem in checkers)
    )
    assert text
    unread = []
    for key in sorted(leaves(names.schema_keys())):
        *parents, leaf = key.split(".")
        pattern = rf"\b{leaf}\b"
        if leaf in GENERIC and parents:
            pattern = rf"\b{parents[-1]}\b[^\n]*\b{leaf}\b|\bchosen\.{leaf}\b"
        elif not parents:
            pattern = rf"\brun\.{leaf}\b"
        if key not in READ_HERE and not re.search(pattern, text):
            unread.append(key)
    assert not unread, f"nothing reads {unread}"


def test_local_settings_are_read_where_they_are(tmp_path):
    """A user's own directory brings new choices and `local=default` is picked up by itself."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /schedule: wsd\nseed: 7\n"
    )
    (tmp_path / "local").mkdir()
    (tmp_path / "local/default.yaml").write_text("# @package _global_\nbatch:\n  sequences: 5\n")
    run = compose([*GIVEN, "experiment=mine"], config_dir=Path(tmp_path))
    assert (run.seed, run.schedule.name, run.batch.sequences) == (7, "wsd", 5)


def test_what_is_typed_beats_an_experiment():
    assert compose([*GIVEN, "experiment=lora", "optim.lr=1e-3", "adapter.rank=4"]).optim.lr == 1e-3
