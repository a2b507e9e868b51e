"""What may be asked of a sweep besides what its jobs are asked: keys of `hydra.sweeper`, refused early."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, ValidationError, model_validator

import framework
from framework.config.names import nearest
from framework.config.nodes import Node, Positive, Text, refuse
from framework.errors import ConfigError

INSTALL = "pip install 'sapwood[sweep]'"

GRID, SEARCH = "basic", "search"
"""Choices of hydra/sweeper. The first is Hydra's default, so that -m alone starts ours in its place."""


class Objective(Node):
    """A number of `result.json` and which of two is better; metric null: what `evaluate` follows."""

    metric: Text | None
    goal: Literal["min", "max"]


class Grid(Node):
    """Keys of a sweep that starts every combination of values."""

    params: dict[str, Any] | None


class Search(Node):
    """Keys of a search; conf/sweep/optuna.yaml explains them."""

    params: dict[str, Any] | None
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] | None
    n_trials: Positive
    n_jobs: Positive
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    startup_trials: Annotated[int, Field(ge=0)]
    pruner: Literal["median"] | None
    prune_after_trials: Annotated[int, Field(ge=0)]
    prune_from_step: Annotated[int, Field(ge=0)]
    storage: Text | None
    study_name: Text | None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.objectives is not None and len(self.objectives) > 1 and self.pruner is not None:
            raise refuse(
                "objectives, pruner",
                f"{len(self.objectives)} objectives and pruner={self.pruner}",
                "no pruning, for a trial that is behind in one may be ahead in another",
                "hydra.sweeper.pruner=null, or sweep=pareto",
            )
        return self


def register() -> None:
    """Make both sweepers known to Hydra, wherever this was started from."""
    root = str(Path(framework.__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.append(root)  # hydra_plugins/ stands beside conf/
    plugins = Plugins.instance()  # Hydra's own have to be there before, to be replaced
    ours = importlib.import_module("hydra_plugins.sapwood")  # starts jobs, which are composed in turn
    for choice, plugin in ((GRID, ours.Grid), (SEARCH, ours.Search)):
        node = {"_target_": f"{plugin.__module__}.{plugin.__name__}", "params": None}
        ConfigStore.instance().store(group="hydra/sweeper", name=choice, node=node, provider="sapwood")
        plugins.register(plugin)


def check(hydra: DictConfig) -> Grid | Search | None:
    """What a composed tree asks of its sweep; None where the sweeper is not one of ours.

    Raises ConfigError.
    """
    choice = str(hydra.runtime.choices.get("hydra/sweeper"))
    models: dict[str, type[Grid] | type[Search]] = {GRID: Grid, SEARCH: Search}
    model = models.get(choice)
    if model is None:
        return None
    tree = OmegaConf.to_container(hydra.sweeper, resolve=True)
    assert isinstance(tree, dict)
    if isinstance(objectives := tree.get("objectives"), list):
        tree["objectives"] = tuple(objectives)
    settings = {key: value for key, value in tree.items() if key != "_target_"}
    try:
        found = model.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(detail) for detail in error.errors())) from error
    if isinstance(found, Search):
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(f"hydra/sweeper=search: optuna is not installed; type {INSTALL}")
        if found.n_jobs > 1 and hydra.runtime.choices.get("hydra/launcher") == "basic":
            raise ConfigError(
                f"hydra.sweeper.n_jobs: found {found.n_jobs} trials at once for a launcher that starts one; "
                "type hydra/launcher=joblib, or hydra.sweeper.n_jobs=1"
            )
    return found


def mistyped(key: str) -> str:
    """What to type instead of a key that `hydra.sweeper` does not have."""
    close = nearest(key, list(Search.model_fields))
    return f"type hydra.sweeper.{close}=VALUE" if close else f"expected {', '.join(Search.model_fields)}"


def _line(detail: Any) -> str:
    """One refusal in our words."""
    key = "hydra.sweeper" + "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in detail["loc"])
    if detail["type"] == "pair":
        return str(detail["msg"])
    if detail["type"] == "missing":
        return f"{key}: not set; type sweep=optuna, which sets what a search needs"
    if detail["type"] == "extra_forbidden":
        return f"{key}: no such key; {mistyped(str(detail['loc'][-1]))}"
    said = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{key}: got {detail['input']!r}; expected another value: {said}"
