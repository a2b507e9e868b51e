"""Leaves some of a model's weights as they are: they have no gradient, no master and no moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from framework.errors import ConfigError


def frozen(build: Callable[[], nn.Module], patterns: Sequence[str]) -> Callable[[], nn.Module]:
    """`build` with every parameter frozen whose name fits one of `patterns`: * any letters, [0-3] a digit.

    A tied parameter is known by all its names. What is built raises ConfigError for a pattern that fits none,
    and where nothing is left to train.
    """
    if not patterns:
        return build

    def built() -> nn.Module:
        module = build()
        named = list(module.named_parameters(remove_duplicate=False))
        for pattern in patterns:
            fitting = [parameter for name, parameter in named if fnmatchcase(name, pattern)]
            if not fitting:
                raise ConfigError(
                    f"protect.freeze: {pattern!r} fits no weight of this model; expected patterns of names "
                    f"such as {', '.join(name for name, _ in named[:3])}; type \"protect.freeze=['*embed*']\""
                )
            for parameter in fitting:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for _, parameter in named):
            raise ConfigError(
                f"protect.freeze: {list(patterns)} leave nothing to train; expected some weights that are; "
                "type \"protect.freeze=['*embed*']\""
            )
        return module

    return built
