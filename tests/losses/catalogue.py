"""Every public loss, found by itself, with settings and made-up inputs for each; for the tests beside it."""

import functools
import importlib
import inspect
import pkgutil
import typing
from pathlib import Path

import torch
import yaml
from torch import Tensor

import framework.losses
from framework.losses.answers import Answers
from framework.losses.items import Items

CONF = Path(__file__).resolve().parents[2] / "conf" / "loss"

BESIDES = {  # losses and settings that no file in conf/loss has
    "generalised_jsd": [{"beta": 0.3}],
    "value_loss": [{"clip": 0.2}, {"clip": None}],
    "sft": [{"label_smoothing": 0.1}],
    "dpo": [{"beta": 0.1, "divergence": d} for d in ("forward_kl", "alpha")],
    "ipo": [{"beta": 0.1, "normalisation": "sum"}],
    "alphapo": [{"beta": 2.5, "gamma": 1.0, "alpha": -0.25}],
    "ppo": [
        {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "entropy": 0.01},
        {"clip_low": 0.2, "clip_high": 0.2, "kl": 0.1, "kl_estimator": "k1", "kl_importance": True},
        {"clip_low": 0.2, "clip_high": 0.2, "kl": 0.1, "kl_estimator": "k3", "kl_importance": True},
    ],
    "reinforce": [{"kl": 0.1, "kl_estimator": "k2", "entropy": 0.1}],
    "mixed": [
        {"losses": {"simpo": 0.5, "sft": 1.0}, "keywords": {"simpo": {"beta": 2.0, "gamma": 1.0}}},
        {"losses": {"odpo": 2.0}, "keywords": {"odpo": {"beta": 0.1, "margin_scale": 1.0}}},
    ],
}


def losses():
    """name -> every public function of the room that returns `Items`."""
    found = {}
    for module in pkgutil.iter_modules(framework.losses.__path__):
        module = importlib.import_module(f"framework.losses.{module.name}")
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if own and not name.startswith("_") and typing.get_type_hints(function).get("return") is Items:
                found[name] = function
    return found


def files():
    """stem -> (function, settings) of every file in conf/loss."""
    found = {}
    for path in sorted(CONF.glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        module, _, name = content.pop("_target_").rpartition(".")
        assert content.pop("_partial_") is True
        found[path.stem] = (getattr(importlib.import_module(module), name), content)
    return found


def bound():
    """label -> a loss with its settings: those of every file, then `BESIDES`, then losses that have none."""
    every, found = losses(), {}
    for stem, (function, settings) in files().items():
        found[stem] = functools.partial(function, **settings)
    for name, variants in BESIDES.items():
        for number, settings in enumerate(variants):
            found[f"{name}-{number}"] = functools.partial(every[name], **settings)
    reached = {loss.func for loss in found.values()}
    for name, function in every.items():
        if function not in reached:
            found[name] = functools.partial(function)
    return found


SEGMENTS = (0, 0, 0, 1, 1, 2, 2, 2, 2, 3)
N = len(SEGMENTS)
CUT = 5  # a place where a segment ends
WEIGHTS = (1.0, 0.0, 0.5, 1.0, 1.0, 2.0, 0.0, 1.0, 0.25, 1.0)
MASKED = [i for i, weight in enumerate(WEIGHTS) if weight == 0]


def made_up(loss, *, seed=0, dtype=torch.float64):
    """name -> an input for each of the loss's, all N units long where they have units."""
    generator = torch.Generator().manual_seed(seed)
    function = loss.func if isinstance(loss, functools.partial) else loss
    hints = typing.get_type_hints(function)
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return {name: _input(name, hints[name], generator, dtype) for name in names}


def _input(name, hint, generator, dtype):
    def uniform(low, high, *shape):
        numbers = torch.rand(*(shape or (N,)), generator=generator, dtype=torch.float64)
        return (low + (high - low) * numbers).to(dtype)

    if hint in (Answers, Answers | None):
        tokens = [torch.randint(1, 9, (N,), generator=generator).to(dtype) for _ in range(2)]
        return Answers(uniform(-9, -1), uniform(-9, -1), *tokens)
    if name == "weight":
        return torch.tensor(WEIGHTS, dtype=dtype)
    if name == "segments":
        return torch.tensor(SEGMENTS)
    if name == "desirable":
        return torch.rand(N, generator=generator) > 0.5
    if name == "tokens_per_pair":
        return 4.5
    if name == "baseline":
        return uniform(0, 1, 1)[0]
    if name in ("student_logps", "teacher_logps"):
        return uniform(-3, 3, N, 7).log_softmax(-1)
    if "logps" in name:
        return uniform(-3, -0.1)
    assert hint in (Tensor, Tensor | None), f"how is {name}: {hint} made up?"
    if name in ("correction", "entropies", "margin"):
        return uniform(0.5, 1.5)
    return uniform(-2, 2)


def changed(inputs, change):
    """The inputs with `change` applied to each tensor of units that holds numbers, weights left alone."""

    def one(name, value):
        if isinstance(value, Answers):
            return Answers(*(change(name, field) for field in value))
        units = isinstance(value, Tensor) and value.dim() > 0 and name not in ("weight", "segments")
        return change(name, value) if units else value

    return {name: one(name, value) for name, value in inputs.items()}


def leaves(inputs):
    """The tensors among the inputs that a gradient can reach, made to ask for one."""
    found = []
    for value in inputs.values():
        for tensor in value[:2] if isinstance(value, Answers) else [value]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                found.append(tensor.requires_grad_())
    return found
