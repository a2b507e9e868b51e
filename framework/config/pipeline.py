"""From a command line to a checked chain of steps: each a run of `launch/train.py` or a function of ours.

A pipeline is a YAML file of `conf/pipeline/` with a mapping of steps, in order. A step of training maps keys
to values exactly as they would be typed behind `launch/train.py`; a step with `_target_` is a function with
keywords. All steps are composed and checked before the first one starts, and each gets a directory named
after what decides its result: a step that changed is done anew beside the old one, the others are not.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError

from framework.config import compose, explain, names, secrets, targets
from framework.config.compose import CONF, Command
from framework.config.schema import Name, Node, Run, Target, Text, digest
from framework.errors import ConfigError

OUTPUTS = ("run_dir", "model")
"""What later steps may name of an earlier one: ${stages.NAME.run_dir}, ${stages.NAME.model}."""

FILES = ("path", "reference_path", "critic", "teacher", "judge")  # last parts of keys that hold paths

GIVEN = (
    "directory",
    "trusted",
)  # parameters by which a function learns where to write, and whose code may run

_REFERENCE = re.compile(r"\$\{\s*stages\.([^.}\s]+)\.?([^}\s]*)\s*\}")
_STAGE_KEY = re.compile(r"(?P<prefix>\+{0,2}|~)stages\.(?P<stage>[^.=]+)\.(?P<rest>.+)", re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z_./$][\w./${}:@+-]*")  # text that Hydra's grammar takes without quotes
_WORDS = ("null", "true", "false", "nan", "inf")  # and that it would not take as text


class Tree(Node):
    """`conf/pipeline.yaml` with a pipeline on top."""

    name: Name | None
    run_dir: Text | None
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    trusted_packages: tuple[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], ...]
    common: dict[str, Any]  # under every step of training
    stages: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]


@dataclass(frozen=True)
class Step:
    """One step with nothing left open: either a `run`, or a `call` of a function."""

    name: str
    directory: Path
    run: Run | None = None
    overrides: tuple[str, ...] = ()  # what launch/train.py is told
    call: Target | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result, as JSON: two steps with equal settings are the same step."""
        if self.run is not None:
            return self.run.decisive()
        assert self.call is not None
        return {"_target_": self.call.target, **self.call.keywords}

    @property
    def command(self) -> str:
        """What repeats this step alone, as a person would type it, without secrets."""
        if self.run is not None:
            return "python launch/train.py " + shlex.join(map(secrets.typed, self.overrides))
        assert self.call is not None
        keywords = secrets.concealed(self.call.keywords)
        return f"{self.call.target}({', '.join(f'{k}={v!r}' for k, v in keywords.items())})"


@dataclass(frozen=True)
class Pipeline:
    """All steps in order, checked."""

    name: str
    run_dir: Path
    trusted: tuple[str, ...]
    steps: tuple[Step, ...]


def check(argv: Sequence[str]) -> Pipeline:
    """The pipeline that a command line asks for, every step composed and its functions bound.

    `experiment=NAME` chooses it; `stages.STEP.KEY=VALUE` sets a key of one step, `~stages.STEP` leaves one
    out, `name`, `run_dir`, `seed` and `trusted_packages` are the pipeline's own, and any other KEY=VALUE is
    for every step of training. Files that an earlier step is going to make need not be there yet.
    Raises ConfigError, which names the step.
    """
    asked = compose.command(argv, config_name="pipeline")
    if asked.multirun:
        raise ConfigError("-m: a pipeline is one chain; sweeps are for `python launch/train.py -m`")
    typed = [_parse(text) for text in asked.overrides]
    chosen = [str(override.value()) for override in typed if override.key_or_group == "experiment"]
    ours = [o.input_line or "" for o in typed if _is_ours(o) and o.key_or_group != "experiment"]
    tree = _tree(asked, chosen, ours)
    if unknown := sorted({stage for stage in map(_stage_of, typed) if stage} - set(tree.stages)):
        close = names.nearest(unknown[0], list(tree.stages))
        raise ConfigError(
            f"stages.{unknown[0]}: no such step; "
            + (f"type stages.{close}" if close else f"expected one of {', '.join(tree.stages)}")
        )
    name = tree.name or (chosen[-1] if chosen else "pipeline")
    run_dir = Path(tree.run_dir or Path("runs") / name).expanduser().absolute()
    steps: dict[str, Step] = {}
    for stage, settings in tree.stages.items():
        mine = [override for override in typed if _stage_of(override) == stage]
        common = [override for override in typed if not _is_ours(override) and _stage_of(override) is None]
        try:
            if "_target_" in settings:
                changed = _changed(stage, settings, mine)
                steps[stage] = _function(stage, changed, tree, run_dir, steps)
            else:
                replaced = {o.key_or_group.removeprefix(f"stages.{stage}.") for o in [*common, *mine]}
                kept = {key: v for key, v in _keys({**tree.common, **settings}) if key not in replaced}
                resolved = _resolved(kept, steps, list(tree.stages))
                steps[stage] = _training(stage, resolved, [*common, *mine], tree, run_dir, asked, steps)
        except ConfigError as error:
            where = f"stages.{stage}"
            raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
    return Pipeline(name, run_dir, tree.trusted_packages, tuple(steps.values()))


def saved(pipeline: Pipeline) -> str:
    """The text of the pipeline's `config.yaml`: its steps in order, where each is and what repeats it."""
    steps = {
        step.name: {
            "kind": step.run.stage.name if step.run is not None else "step",
            "run_dir": str(step.directory),
            "command": step.command,
        }
        for step in pipeline.steps
    }
    tree = {"name": pipeline.name, "run_dir": str(pipeline.run_dir), "stages": steps}
    return "# The steps of this pipeline, as they were last asked for.\n" + yaml.safe_dump(
        tree, sort_keys=False, allow_unicode=True, width=110
    )


def _training(
    stage: str,
    settings: Mapping[str, Any],
    typed: Sequence[Override],
    tree: Tree,
    run_dir: Path,
    asked: Command,
    earlier: Mapping[str, Step],
) -> Step:
    """A run of `launch/train.py`, composed and bound."""
    texts = {"seed": f"seed={tree.seed}"}
    if tree.trusted_packages:
        texts["trusted_packages"] = f"trusted_packages={_text(list(tree.trusted_packages))}"
    texts |= {key: f"{key}={_text(value)}" for key, value in _keys(settings)}
    for override in typed:
        found = _STAGE_KEY.fullmatch(override.input_line or "")
        text = found["prefix"] + found["rest"] if found else override.input_line or ""
        text = _resolved(text, earlier, list(tree.stages))
        key = text.lstrip("+~").partition("=")[0]
        texts.pop(key, None)  # what is typed later stands later
        texts[key] = text
    if "run_dir" in texts:
        raise ConfigError(
            "run_dir: the pipeline places its steps itself; type run_dir=DIRECTORY for all of it"
        )
    told = list(texts.values())
    flags = [] if asked.config_dir is None else [f"--config-dir={asked.config_dir}"]
    compose.check([*flags, *told])
    run = compose.compose(told, config_dir=asked.config_dir)
    if run.launch.nnodes > 1:
        raise ConfigError(
            f"launch.nnodes: found {run.launch.nnodes}; expected 1, since a pipeline decides on one machine "
            "what is done; type the commands that --dry-run shows on each machine"
        )
    if run.tracker.wandb is not None and "tracker.wandb.group" not in texts:
        told.append(f"tracker.wandb.group={_text(run_dir.name)}")  # a dashboard shows all steps together
    for key, path in _paths(run.model_dump(mode="json")):
        _expect(key, path, run_dir, earlier)
    directory = run_dir / f"{stage}-{run.identity()}"
    run = run.model_copy(update={"run_dir": str(directory)})
    return Step(stage, directory, run=run, overrides=(*flags, *told, f"run_dir={_text(str(directory))}"))


def _changed(stage: str, settings: Mapping[str, Any], typed: Sequence[Override]) -> dict[str, Any]:
    """A function's settings with what was typed for them; nothing is resolved: what goes may name no step."""
    config = OmegaConf.create(dict(settings))
    for override in typed:
        key = override.key_or_group.removeprefix(f"stages.{stage}.")
        if not override.is_delete():
            OmegaConf.update(config, key, override.value(), merge=False)
            continue
        parent, _, last = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if not isinstance(node, DictConfig) or last not in node:
            expected = ", ".join(map(str, node)) if isinstance(node, DictConfig) else "a key that is there"
            raise ConfigError(f"~{override.key_or_group}: no such key; expected {expected}")
        del node[last]
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))


def _function(
    stage: str,
    settings: Mapping[str, Any],
    tree: Tree,
    run_dir: Path,
    earlier: Mapping[str, Step],
) -> Step:
    """A function that takes `directory` and is bound to all else; its `seed` is the pipeline's if not set."""
    keywords = _resolved(settings, earlier, list(tree.stages))
    target = keywords.pop("_target_")
    keywords.pop("_partial_", None)
    for key, value in _leaves(keywords):
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise ConfigError(
                f"{key}: found {value}; expected a plain value; type stages.{stage}.{key}=VALUE"
            )
    try:
        call = Target.model_validate({"_target_": target, "_partial_": True, **keywords})
    except ValidationError as error:
        raise ConfigError(f"_target_: found {target!r}; expected package.module.function") from error
    function = targets.find(call.target, tree.trusted_packages, key=f"stages.{stage}._target_")
    if "seed" in getattr(function, "__annotations__", {}) and "seed" not in keywords:
        call = Target.model_validate({"_target_": target, "_partial_": True, **keywords, "seed": tree.seed})
    targets.resolve(call, tree.trusted_packages, key=f"stages.{stage}", supplied=GIVEN)
    for key, path in _paths(call.keywords):
        _expect(key, path, run_dir, earlier)
    mark = digest({"_target_": call.target, **call.keywords})
    return Step(stage, run_dir / f"{stage}-{mark}", call=call)


def _tree(asked: Command, chosen: Sequence[str], overrides: Sequence[str]) -> Tree:
    """`conf/pipeline.yaml` with the chosen pipeline on top, its steps as written."""
    pipelines = names.pipelines(asked.directories)
    for name in chosen:
        if name not in pipelines:
            close = names.nearest(name, pipelines)
            type_this = f"type experiment={close}" if close else f"there are {', '.join(pipelines)}"
            raise ConfigError(f"experiment={name}: no such pipeline; {type_this}")
    own = [] if asked.config_dir is None else [f"hydra.searchpath=['file://{asked.config_dir}']"]
    choice = [f"pipeline@_global_={chosen[-1]}"] if chosen else []
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra_compose(asked.config_name, overrides=[*own, *choice, *overrides])
        written: Any = OmegaConf.to_container(config, resolve=False)
        as_written = {key: written[key] for key in ("common", "stages")}  # interpolations are later steps'
        tree = {key: OmegaConf.select(config, key) for key in Tree.model_fields if key not in as_written}
        tree = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in tree.items()}
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(explain.composition(error, overrides, asked.directories)) from error
    if not as_written["stages"]:
        raise ConfigError(
            f"experiment: not given; expected one of {', '.join(pipelines)}; type experiment={pipelines[0]}"
        )
    try:
        return Tree.model_validate_json(json.dumps({**tree, **as_written}))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from error


def _resolved(value: Any, earlier: Mapping[str, Step], stages: Sequence[str]) -> Any:
    """`value` with ${stages.NAME.OUTPUT} replaced by paths; other interpolations are left as they are."""

    def path(found: re.Match[str]) -> str:
        stage, output = found[1], found[2]
        if stage not in earlier:
            where = "comes later" if stage in stages else "is no step"
            known = ", ".join(earlier) or "none"
            raise ConfigError(f"{found[0]}: {stage} {where}; expected an earlier step ({known})")
        if output not in OUTPUTS:
            expected = " or ".join(f"${{stages.{stage}.{name}}}" for name in OUTPUTS)
            raise ConfigError(f"{found[0]}: no such output; expected {expected}")
        step = earlier[stage]
        if output == "run_dir":
            return str(step.directory)
        if step.run is not None and not step.run.checkpoint.export:
            raise ConfigError(
                f"{found[0]}: {stage} writes no model; type stages.{stage}.checkpoint.export=true"
            )
        return str(step.directory / "model")

    if isinstance(value, str):
        return _REFERENCE.sub(path, value)
    if isinstance(value, Mapping):
        return {key: _resolved(inner, earlier, stages) for key, inner in value.items()}
    return [_resolved(inner, earlier, stages) for inner in value] if isinstance(value, list) else value


def _expect(key: str, path: str, run_dir: Path, earlier: Mapping[str, Step]) -> None:
    """Refuse a file of this machine that is neither there nor going to be made. Hub ids are let be."""
    whole = Path(path).expanduser()
    if any(whole.is_relative_to(step.directory) for step in earlier.values()):
        return
    local = whole.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or ".json" in path
    if local and not whole.exists() and not any(letter in path for letter in "*?["):
        raise ConfigError(
            f"{key}: no {path}; expected a file or directory that is there, or one of an earlier step: "
            "${stages.NAME.run_dir}/FILE"
        )


def _keys(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values as they are typed: a group's are typed one by one, since its name alone chooses."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and "." not in key:
            yield from ((f"{key}.{inner}", its) for inner, its in value.items())
        else:
            yield key, value


def _paths(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every key that names files, with its value."""
    for key, value in _leaves(tree):
        name = key.rpartition(".")[2]
        if isinstance(value, str) and (name in FILES or key == "reward.model"):
            yield key, value


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{where}[{index}]")
    else:
        yield where, value


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(explain.unreadable(text, error, [CONF])) from error


def _stage_of(override: Override) -> str | None:
    """The step whose key this sets; None for what is said to all, and for a whole step."""
    found = _STAGE_KEY.fullmatch(override.input_line or "")
    return found["stage"] if found else None


def _is_ours(override: Override) -> bool:
    """Whether it is the pipeline's own key, or a whole step."""
    key = override.key_or_group
    own = key in ("experiment", "common", "stages", "name", "run_dir", "seed", "trusted_packages")
    return own or (key.startswith("stages.") and _stage_of(override) is None)


def _text(value: Any) -> str:
    """`value` as Hydra's grammar reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    if not isinstance(value, str):
        return str(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), value)
    return f"'{escaped}'"  # a backslash is itself unless it stands before a quote
