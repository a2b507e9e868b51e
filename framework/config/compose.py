"""From a command line to a validated run: Hydra composes `conf/`, pydantic refuses, people get words.

Whatever is wrong ends in one ConfigError that says what was given, what was expected and what to type.
Nothing here imports torch, so a mistyped key is refused in a fraction of a second.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

import framework
from framework.config import explain, secrets, space, sweeping, targets
from framework.config.record import withheld
from framework.config.schema import Run, digest
from framework.config.settle import validated
from framework.errors import ConfigError

CONF = Path(framework.__file__).resolve().parent.parent / "conf"
"""The settings that come with the code, wherever a command is typed."""

PAIRS = (("steps", "epochs"), ("schedule.warmup_steps", "schedule.warmup_fraction"))
"""Two ways to say one thing: the first rules where only the YAML files give the second."""


@dataclass(frozen=True)
class Command:
    """A command line of ours, taken apart."""

    overrides: tuple[str, ...]
    config_name: str
    config_dir: Path | None  # the user's own groups
    multirun: bool
    asks: bool  # --help, --cfg and the like: Hydra answers and nothing runs

    @property
    def directories(self) -> list[Path]:
        """Where YAML files are looked for, ours first."""
        return [CONF] if self.config_dir is None else [CONF, self.config_dir]


def command(argv: Sequence[str], *, config_name: str = "train") -> Command:
    """Take `argv` (without the program's name) apart as Hydra does.

    Raises ConfigError for a flag that is not Hydra's and a --config-dir that is not there.
    """
    flags = _Flags(add_help=False, allow_abbrev=False)
    flags.add_argument("overrides", nargs="*")
    flags.add_argument("--multirun", "-m", action="store_true")
    flags.add_argument("--run", "-r", action="store_true")
    flags.add_argument("--config-name", "-cn", default=config_name)
    flags.add_argument("--config-dir", "-cd", type=Path)
    flags.add_argument("--cfg", "-c")
    flags.add_argument("--package", "-p")
    flags.add_argument("--info", "-i", nargs="?", const="all")
    for question in ("--help", "--hydra-help", "--version", "--resolve"):
        flags.add_argument(question, action="store_true")
    flags.add_argument("-h", dest="help", action="store_true")
    flags.add_argument("--shell-completion", "-sc", action="store_true")
    given = flags.parse_intermixed_args(list(argv))
    if given.config_dir is not None and not given.config_dir.is_dir():
        raise ConfigError(f"--config-dir: found {given.config_dir}; expected a directory of YAML groups")
    return Command(
        overrides=tuple(given.overrides),
        config_name=given.config_name,
        config_dir=None if given.config_dir is None else given.config_dir.absolute(),
        multirun=given.multirun,
        asks=any(
            (given.help, given.hydra_help, given.version, given.cfg, given.info, given.shell_completion)
        ),
    )


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; settings are typed KEY=VALUE, flags are Hydra's (--help shows them)")


def compose(overrides: Sequence[str], *, config_name: str = "train", config_dir: Path | None = None) -> Run:
    """The run that these overrides ask for, on top of `conf/` and the user's `config_dir`.

    Raises ConfigError for anything that cannot be carried out as written. Imports no torch and no
    function: `check` and the composition root bind what `_target_` names.
    """
    return _single(Command(tuple(overrides), config_name, config_dir, multirun=False, asks=False), overrides)


def check(argv: Sequence[str], *, config_name: str = "train") -> None:
    """Refuse a command line before Hydra sees it, with every value of a sweep looked at.

    All first values compose together, and every other value once in place of the first, so a sweep of
    3 x 4 x 5 jobs costs 10 compositions. Losses are bound. Raises ConfigError.
    """
    asked = command(argv, config_name=config_name)
    if asked.asks:
        return
    losses = {}
    for overrides in _jobs(asked):
        run = _single(asked, overrides)
        if run.tracker.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tracker.tensorboard: found no package tensorboard, which writes event files; "
                "type pip install 'sapwood[tensorboard]', or tracker=local"
            )
        if asked.multirun and run.launch.nnodes > 1:
            raise ConfigError(
                f"launch.nnodes: found {run.launch.nnodes} machines for the whole sweep; expected one, which "
                "keeps it; to give each job several, start it on one and type hydra/launcher=submitit_slurm "
                f"hydra.launcher.nodes={run.launch.nnodes}"
            )
        losses[run.loss.model_dump_json()] = run
    for run in losses.values():
        targets.loss(run)


def line(arguments: Sequence[str]) -> str:
    """The command of a run or a sweep as a person would type it."""
    return "python launch/train.py " + shlex.join(arguments)


def launcher(asked: Command) -> str:
    """The class of Hydra's that is to start the jobs of a sweep."""
    return str(_compose(asked, _first(asked)).hydra.launcher._target_)


def composed(config: DictConfig) -> Run:
    """The run in a tree that `hydra.main` composed, for the task function. Raises ConfigError.

    In a sweep the default directory of a job lies in the sweep's, under the job's own name.
    """
    hydra = HydraConfig.get()
    sweep = Path(hydra.sweep.dir).absolute() if hydra.mode == RunMode.MULTIRUN else None
    directories = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    return _run(config, hydra.runtime.choices, as_typed(hydra), directories, sweep)


def as_typed(hydra: Any) -> list[str]:
    """The overrides of a job, nothing in them resolved: ${oc.env:NAME} says where a value is and stays so."""
    typed = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(typed, list)
    return [str(text) for text in typed]


def sweep_dir(overrides: Sequence[str]) -> Path:
    """runs/sweep-<hash>: where a sweep's jobs are kept, the same one for the same command.

    To be handed to Hydra as `hydra.sweep.dir`; how the jobs are launched, watched and how many there are does
    not count.
    """
    incidental = ("launch", "tracker", "hydra", "checkpoint")
    telling = sorted(
        text
        for override, text in zip(_parse(overrides), overrides, strict=True)
        if override.key_or_group.startswith("hydra.sweeper.params")
        or override.key_or_group.partition(".")[0].partition("/")[0] not in incidental
    )
    return Path("runs", f"sweep-{digest({'overrides': telling})}").absolute()


def _single(asked: Command, overrides: Sequence[str]) -> Run:
    config = _compose(asked, overrides)
    return _run(config, config.hydra.runtime.choices, overrides, asked.directories)


def _jobs(asked: Command) -> Iterator[list[str]]:
    """Command lines of single runs that stand for all of a sweep, or the command line itself."""
    if not asked.multirun:
        yield list(asked.overrides)
        return
    typed = {override.get_key_element(): override for override in _parse(asked.overrides)}
    hydra = _compose(asked, _first(asked)).hydra
    settings = sweeping.check(hydra)
    params = hydra.sweeper.get("params") or {}
    for override in _parse([f"{key}={value}" for key, value in params.items()]):
        typed.setdefault(override.get_key_element(), override)
    searched = isinstance(settings, sweeping.Search)
    values = {
        key: space.dimension(override).values if searched else space.listed(override)
        for key, override in typed.items()
    }
    if searched and (named := [key for key in values if len(values[key]) > 1 and secrets.named(key)]):
        raise ConfigError(
            f"{named[0]}: a search writes what it tries into its study; expected no secret there; "
            "give secrets by the environment"
        )
    if len(values.get("run_dir", ())) == 1:
        raise ConfigError("run_dir: one directory for all jobs of a sweep; expected one each; leave it out")
    first = [f"{key}={options[0]}" for key, options in values.items()]
    yield first
    for position, (key, options) in enumerate(values.items()):
        for option in options[1:]:
            yield [*first[:position], f"{key}={option}", *first[position + 1 :]]


def _first(asked: Command) -> list[str]:
    """The overrides with the first value of each."""
    return [f"{o.get_key_element()}={space.dimension(o).values[0]}" for o in _parse(asked.overrides)]


def _one_of_two(overrides: Sequence[str]) -> None:
    """Refuse both of a pair typed together; a default gives way by itself."""
    typed = {override.key_or_group for override in _parse(overrides) if override.value() is not None}
    for first, second in PAIRS:
        if {first, second} <= typed:
            raise ConfigError(f"{first}, {second}: both given; expected one of the two; leave out {second}")


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            raise ConfigError(explain.unreadable(text, error, [CONF])) from error
    return parsed


def _compose(asked: Command, overrides: Sequence[str]) -> DictConfig:
    """The composed tree with its `hydra` node."""
    _parse(overrides)
    sweeping.register()
    own = [] if asked.config_dir is None else [f"hydra.searchpath=['file://{asked.config_dir}']"]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose(asked.config_name, overrides=[*own, *overrides], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(explain.composition(error, overrides, asked.directories)) from error


def _run(
    config: DictConfig,
    choices: Mapping[str, str | None],
    overrides: Sequence[str],
    directories: Sequence[Path],
    sweep: Path | None = None,
) -> Run:
    """Resolve, fill in names and validate a composed tree."""
    with open_dict(config):
        config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        if absent := OmegaConf.missing_keys(config):
            raise ConfigError(explain.missing(absent, directories))
        tree: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain.resolution(error)) from error
    _one_of_two(overrides)
    experiment = choices.get("experiment")
    together = sweep.name if sweep else experiment
    if isinstance(tree["tracker"], dict) and isinstance(wandb := tree["tracker"].get("wandb"), dict):
        wandb["group"] = wandb.get("group") or together
    try:
        run = validated(tree, sweep=sweep)
    except ValidationError as error:
        raise ConfigError(explain.validation(error, tree, overrides, directories)) from error
    run._withheld = withheld(config)
    return run
