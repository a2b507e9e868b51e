"""Functions named in the configuration: found, checked and bound without Hydra's `instantiate`.

Only a plain function or class defined in `framework` or in a package that the user trusts can be
named. Nothing is called here: a name becomes a `functools.partial` whose keywords fit its signature.
Imports what the name says, so a mistake is found before any weight is loaded.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import yaml

from framework.config.names import nearest
from framework.config.nodes import RewardFunction, Target
from framework.config.schema import Run
from framework.errors import ConfigError


def loss(run: Run) -> Callable[..., Any]:
    """The run's loss, bound to its keywords and tried once on made-up inputs of its stage.

    What a loss may ask for by parameter name depends on the stage. Raises ConfigError as `resolve` does,
    for a loss of another stage, with the names of those that fit, and where the function refuses its
    keywords.
    """
    from framework.losses.inputs import inputs
    from framework.losses.items import Items

    node, name = run.loss, run.stage.name
    function = find(node.target, run.trusted_packages, key="loss._target_")
    offers = _offers(name)
    if not _suits(function, node.keywords, offers):
        raise _misfit(function, node, name)
    supplied = frozenset().union(*offers)
    bound = resolve(node, run.trusted_packages, key="loss", supplied=supplied)
    given = ", ".join(f"loss.{key}={value}" for key, value in node.keywords.items()) or "loss"
    try:
        wanted = inputs(bound)
        offer = next((o for o in offers if wanted <= set(o) and wanted & o.decisive), None)
        items = bound(**{key: offer[key] for key in wanted}) if offer is not None else None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{given}: {node.target} refuses: {error}") from error
    if offer is None:
        raise _misfit(function, node, name, sorted(wanted))
    beside = sorted(wanted - {"logps", "weight"})
    if name == "sft" and run.replay.objective == "start" and beside:
        raise ConfigError(
            f"replay.objective, loss: {given} asks for {', '.join(beside)} beside the start model's answers; "
            "expected a loss of log-probabilities alone; type loss=sft loss.label_smoothing=0 or "
            "replay.objective=text"
        )
    if not isinstance(items, Items):
        raise ConfigError(f"loss._target_: {node.target} returned {type(items).__name__}; expected Items")
    return bound


@functools.cache
def losses_of(stage: str) -> tuple[str, ...]:
    """The choices of `conf/loss` whose functions fit a stage, sorted."""
    offers = _offers(stage)
    return tuple(n for n, node in _files() if _suits(find(node.target, ()), node.keywords, offers))


def rewards(run: Run) -> None:
    """Refuse a reward function that is not there or whose keywords do not fit. Raises ConfigError."""
    from framework.rollout.pool import SUPPLIED

    wanted = [(f"reward.functions[{n}]", each) for n, each in enumerate(run.reward.functions)]
    if run.evaluate.score is not None:
        wanted.append(("evaluate.score", run.evaluate.score))
    if run.retain.score is not None:
        wanted.append(("retain.score", run.retain.score))
    for key, function in wanted:
        resolve(function, run.trusted_packages, key=key, supplied=SUPPLIED)
    environment(run)


def environment(run: Run) -> functools.partial[Any] | None:
    """The class of the run's environment bound to its keywords; None where there is none.

    Raises ConfigError as `resolve` does, and for what is no class with the methods of an environment.
    """
    node, key = run.reward.environment, "reward.environment"
    if node is None:
        return None
    found = find(node.target, run.trusted_packages, key=f"{key}._target_")
    methods = ("rows", "score")
    lacking = [name for name in methods if not callable(getattr(found, name, None))]
    if not inspect.isclass(found) or lacking:
        kind = f"a class without {' and '.join(lacking)}" if inspect.isclass(found) else "a function"
        raise ConfigError(
            f"{key}._target_: {node.target} is {kind}; expected a class with the methods rows(split) and "
            "score(answer, row)"
            + (
                ""
                if inspect.isclass(found)
                else f"; a function goes into reward.functions: type reward=none "
                f"'reward.functions=[{{_target_: {node.target}}}]'"
            )
        )
    return resolve(node, run.trusted_packages, key=key)


USUAL = {
    "sft": "sft",
    "distill": "forward_kl",
    "reward": "reward",
    "preference": "dpo",
    "ppo": "ppo",
    "grpo": "grpo",
}


class _Offer(dict[str, Any]):
    """Made-up inputs by name, and those of which a loss must take one to be a loss of this kind."""

    decisive: frozenset[str]

    def __init__(self, values: Mapping[str, Any], decisive: Iterable[str]) -> None:
        super().__init__(values)
        self.decisive = frozenset(decisive)


def _offers(stage: str) -> list[_Offer]:
    """What losses of a stage may ask for, two units of each."""
    import torch

    from framework.losses.answers import Answers
    from framework.stages import distill, preference, reward, sft, started, unpaired
    from framework.stages.policy_objective import OFFERED

    ones, nats = torch.ones(2), -torch.ones(2)
    answers = Answers(nats, 2 * nats, ones, ones)
    match stage:
        case "sft":
            computed = ("logps", *sft.COMPUTED)
            known = {"weight": ones, **dict.fromkeys(started.STARTED, -nats)}
            return [_Offer(dict.fromkeys(computed, nats) | known, computed)]
        case "distill":
            even = torch.full((2, 3), 1 / 3).log()
            offered = dict.fromkeys(distill.INPUTS, even) | {"weight": ones}
            return [_Offer(offered, ("student_logps",))]
        case "reward":
            return [_Offer(dict.fromkeys(reward.INPUTS, ones), ("chosen", "rejected"))]
        case "preference":
            pairs: dict[str, Any] = dict.fromkeys(preference.INPUTS, ones)
            pairs |= dict.fromkeys(("policy", "reference", *preference.EXTRAS), answers)
            single = dict.fromkeys(unpaired.INPUTS, nats) | {"weight": ones, "desirable": ones > 0}
            single["baseline"] = torch.zeros(())
            return [
                _Offer(pairs | {"tokens_per_pair": 1.0}, ("policy",)),
                _Offer(single, ("desirable",)),
            ]
        case _:
            tokens = dict.fromkeys(OFFERED, nats)
            tokens |= {"weight": ones, "segments": torch.zeros(2, dtype=torch.int64), "correction": ones}
            return [_Offer(tokens, ("advantages",))]


@functools.cache
def _files() -> list[tuple[str, Target]]:
    """The choices of `conf/loss`, sorted."""
    from framework.config.compose import CONF  # which imports this module

    files = sorted((CONF / "loss").glob("*.yaml"))
    return [(f.stem, Target.model_validate(yaml.safe_load(f.read_text(encoding="utf-8")))) for f in files]


def _suits(function: Callable[..., Any], keywords: Collection[str], offers: Sequence[_Offer]) -> bool:
    """Whether one of `offers` has what `function` needs and something that makes it a loss of this kind.

    A name that no stage offers is a setting, which `resolve` looks after.
    """
    asked = _asked(function)
    needed = {name for name, needs in asked.items() if needs and name not in keywords} & _offered()
    return any(needed <= set(offer) and asked.keys() & offer.decisive for offer in offers)


@functools.cache
def _offered() -> frozenset[str]:
    """What any stage offers."""
    return frozenset().union(*(offer for stage in USUAL for offer in _offers(stage)))


def _asked(function: Callable[..., Any]) -> dict[str, bool]:
    """Inputs that `function` names, and whether it cannot do without; see `losses.inputs`."""
    return {
        p.name: p.default is p.empty
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    }


def _misfit(
    function: Callable[..., Any], node: Target, stage: str, wanted: Sequence[str] | None = None
) -> ConfigError:
    """A loss that `stage` cannot give what it asks for (`wanted`, or what it cannot do without)."""
    if wanted is None:
        wanted = sorted(name for name, needs in _asked(function).items() if needs)
    same = " or ".join(f"loss={name}" for name, file in _files() if file == node)
    listed = " or ".join(", ".join(offer) for offer in _offers(stage))
    others = [
        f"stage={other}"
        for other in USUAL
        if other != stage and _suits(function, node.keywords, _offers(other))
    ]
    usual, rest = USUAL[stage], [name for name in losses_of(stage) if name != USUAL[stage]]
    asks = f"{same or 'loss._target_'}: {node.target} asks for {', '.join(wanted) or 'nothing'}"
    expected = f"a loss of stage={stage}, which offers {listed}"
    type_this = f"loss={usual}" + (f" or one of {', '.join(rest)}" if rest else "")
    goes = f"; this one goes with {' or '.join(others)}" if others else ""
    return ConfigError(f"{asks}; expected {expected}; type {type_this}{goes}")


def resolve(
    node: Target | RewardFunction,
    trusted: Iterable[str],
    *,
    key: str = "loss",
    supplied: Collection[str] = (),
) -> functools.partial[Any]:
    """`node`'s function with `node`'s keywords bound.

    `trusted` are packages allowed besides `framework`; `key` is where in the tree the node stands;
    `supplied` are parameters that the caller fills in later, which the node must leave alone.
    Raises ConfigError for a name outside of these packages, a name that is not there, and a keyword
    that is unknown, missing or taken.
    """
    function = find(node.target, trusted, key=f"{key}._target_")
    _plain(node.keywords, key)
    _fits(function, node, key, supplied)
    return functools.partial(function, **node.keywords)


def find(name: str, trusted: Iterable[str], *, key: str = "_target_") -> Callable[..., Any]:
    """The function or class called `name`, which is module.attribute.

    The module is imported by its own name, never reached through another module's imports, and the
    object found must have been defined in the same package: `framework.any.os.system` is no module, and
    an `open` that somebody imported is defined elsewhere.
    """
    packages = ("framework", *trusted)
    top = name.partition(".")[0]
    if top not in packages or top in sys.stdlib_module_names:
        own = (
            "" if top in sys.stdlib_module_names else f"; if {top} is your own, add trusted_packages=[{top}]"
        )
        raise ConfigError(f"{key}: found {name}; expected a function of {' or '.join(packages)}{own}")
    module_name, _, attribute = name.rpartition(".")
    if any(part.startswith("_") or not part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{key}: found {name}; expected module.function, neither of them private")
    module = _import(module_name, name, key)
    if not hasattr(module, attribute):
        public = [n for n, value in vars(module).items() if _defined(value, packages) and n[0] != "_"]
        raise ConfigError(
            f"{key}: no {attribute} in {module_name}{_hint(key, module_name, attribute, public)}"
        )
    found = getattr(module, attribute)
    if not _defined(found, packages):
        raise ConfigError(
            f"{key}: found {name}, which is no function defined in {' or '.join(packages)}; expected one"
        )
    return found


def _import(module_name: str, name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(missing + "."):
            raise ConfigError(f"{key}: {module_name} needs {missing}, which is not installed") from error
        parent_name, _, last = missing.rpartition(".")
        parent = importlib.import_module(parent_name) if parent_name else None
        siblings = [m.name for m in pkgutil.iter_modules(getattr(parent, "__path__", []))]
        rest = name[len(missing) :]
        close = nearest(last, siblings)
        unknown = (
            "; is it installed?" if parent is None else "; expected module.function, as its author wrote it"
        )
        hint = f"; {_typed(key, f'{parent_name}.{close}{rest}')}" if close else unknown
        raise ConfigError(f"{key}: found {name}, but there is no module {missing}{hint}") from error


def _defined(found: object, packages: Iterable[str]) -> bool:
    """Whether `found` is a plain function or class that one of `packages` defines."""
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        return False
    return found.__module__.partition(".")[0] in packages


def _hint(key: str, module_name: str, attribute: str, known: Collection[str]) -> str:
    close = nearest(attribute, known)
    if close:
        return f"; {_typed(key, f'{module_name}.{close}')}"
    return f"; it has {', '.join(sorted(known))}" if known else ""


def _typed(key: str, value: str) -> str:
    """What to do instead; a member of a list cannot be set by itself on the command line."""
    return f"write {key.rpartition('.')[2]}: {value}" if "[" in key else f"type {key}={value}"


def _plain(value: Any, key: str) -> None:
    """Keywords are plain values: nothing in them names a function in its turn."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name.startswith("_") and name.endswith("_"):
                raise ConfigError(
                    f"{key}.{name}: found inside of {key}; expected plain values only; remove it"
                )
            _plain(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _plain(inner, f"{key}[{index}]")


def _fits(
    function: Callable[..., Any], node: Target | RewardFunction, key: str, supplied: Collection[str]
) -> None:
    parameters = inspect.signature(function).parameters
    settable = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    free = [name for name in settable if name not in supplied]
    for name in node.keywords:
        if name in supplied:
            raise ConfigError(f"{key}.{name}: is filled in while training; remove it")
        if name not in settable and not takes_any:
            close = nearest(name, free)
            plus = "+" if key == "reward.environment" else ""  # no file of ours lists its keywords
            type_this = f"type {plus}{key}.{close}" if close else f"it has {', '.join(free) or 'no keywords'}"
            raise ConfigError(f"{key}.{name}: {node.target} has no such keyword; {type_this}")
    for name, parameter in parameters.items():
        given = name in node.keywords or name in supplied or parameter.default is not parameter.empty
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not given and not variadic:
            raise ConfigError(
                f"{key}.{name}: {node.target} needs it and it is not set; type +{key}.{name}=VALUE"
            )
