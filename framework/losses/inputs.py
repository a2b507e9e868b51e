"""Which inputs a loss asks for, read off its signature, so that nothing is computed in vain.

An input is a parameter that may be given by position; what is keyword-only is a setting. An input with a
default may depend on a setting: a KL term of coefficient 0 reads no reference. Such a loss says so with
`optional`, and whoever supplies the inputs asks `inputs`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Settings = Mapping[str, Any]
Loss = TypeVar("Loss", bound=Callable[..., Any])


def optional(**reads: Callable[[Settings], bool]) -> Callable[[Loss], Loss]:
    """Declare under which settings a loss reads the inputs named; in all other respects it is unchanged."""

    def declare(loss: Loss) -> Loss:
        setattr(loss, "reads", reads)  # noqa: B010 - a function has no declared attributes
        return loss

    return declare


def inputs(loss: Callable[..., Any]) -> frozenset[str]:
    """Names of the inputs that `loss`, a function or a `functools.partial` of one, reads as it is bound.

    `inputs(partial(ppo, clip_low=0.2, clip_high=0.2))` holds no `reference_logps`; with kl=0.05 it does.
    """
    function = loss.func if isinstance(loss, functools.partial) else loss
    bound = loss.keywords if isinstance(loss, functools.partial) else {}
    parameters = inspect.signature(function).parameters.values()
    settings = {p.name: p.default for p in parameters if p.default is not p.empty} | bound
    reads: Mapping[str, Callable[[Settings], bool]] = getattr(function, "reads", {})
    return frozenset(
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.name not in bound
        and (p.name not in reads or reads[p.name](settings))
    )


def running_baseline(loss: Loss) -> Loss:
    """Declare that a loss's `baseline` is the mean reward of all answers so far, and not KTO's."""
    setattr(loss, "baseline", "running")  # noqa: B010 - a function has no declared attributes
    return loss


def has_running_baseline(loss: Callable[..., Any]) -> bool:
    """Whether `loss`, a function or a `functools.partial` of one, was declared with `running_baseline`."""
    function = loss.func if isinstance(loss, functools.partial) else loss
    return getattr(function, "baseline", None) == "running"
