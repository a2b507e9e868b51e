"""A model that is only asked: no gradients, no masters, no moments, under every strategy.

Knows neither losses nor how weights are spread: a strategy says how one whole tensor becomes what a rank
keeps of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from framework.strategy import common
from framework.strategy.base import World

Put = Callable[[Any, Tensor], None]
"""put(parameter, whole): keep this rank's part of a whole tensor, in the parameter's own type."""


class Frozen:
    """See `framework.strategy.base.Frozen`."""

    def __init__(
        self, world: World, module: nn.Module, parameters: Mapping[str, nn.Parameter], put: Put
    ) -> None:
        """`module` answers; `parameters` are its own as they are kept, by name."""
        self.world = world
        module.eval()
        self._module = module
        self._parameters = parameters
        self._put = put

    @torch.no_grad()
    def __call__(self, batch: Any, **options: Any) -> Any:
        return common.call(self._module, batch, self.world.device, **options)

    @torch.no_grad()
    def refill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        missing = set(self._parameters)
        for name, whole in weights:
            if name not in missing:
                raise ValueError(f"{name} is no parameter of the frozen model, or came twice")
            missing.remove(name)
            self._put(self._parameters[name], whole)
        if missing:
            raise ValueError(f"refill() was given no value for {', '.join(sorted(missing))}")


def put_whole(parameter: nn.Parameter, whole: Tensor) -> None:
    """For replicated weights."""
    parameter.copy_(whole)
