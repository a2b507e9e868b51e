"""What a sweep goes through, key by key, in Hydra's own grammar.

KEY=A,B,C                            values, all of them or one of them
KEY=range(1,9)                       whole steps, the end left out
KEY=interval(1e-6,1e-4)              any number between, for a search
KEY=int(interval(1,8))               any whole number between
KEY=tag(log,interval(1e-6,1e-4))     as likely between 1e-6 and 1e-5 as between 1e-5 and 1e-4
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from framework.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """One of several values, as text that Hydra's grammar reads back."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """A number from `low` to `high`, both included; `whole` ones only, every `step` only, or any."""

    low: float
    high: float
    log: bool = False
    whole: bool = False
    step: float | None = None

    @property
    def values(self) -> tuple[str, ...]:
        """Both ends, as text: what is allowed there is allowed between them."""
        return self.text(self.low), self.text(self.high)

    def text(self, value: float) -> str:
        """A value as it is typed: with four digits, for more say nothing, but never out of the interval."""
        if self.whole:
            return str(round(value))
        short = float(f"{value:.4g}")
        return repr(short if self.low <= short <= self.high else float(value))


Dimension = Choice | Interval


def dimension(override: Override) -> Dimension:
    """The values an override goes through; a plain value is a choice of one."""
    if not override.is_sweep_override():
        return Choice((override.get_value_element_as_str(),))
    found, log = override.value(), "log" in getattr(override.value(), "tags", ())
    if isinstance(found, IntervalSweep):
        if found.start is None or found.end is None or not found.start < found.end:
            raise ConfigError(f"{override.input_line}: found no numbers between; type the smaller one first")
        if log and found.start <= 0:
            raise ConfigError(f"{override.input_line}: a logarithm of {found.start}; start above 0")
        return Interval(found.start, found.end, log=log, whole=isinstance(found.start, int))
    values = tuple(override.sweep_string_iterator())
    if isinstance(found, RangeSweep) and not found.shuffle and len(values) > 1:
        numbers = sorted(map(float, values))
        whole = all(isinstance(part, int) for part in (found.start, found.stop, found.step))
        return Interval(numbers[0], numbers[-1], whole=whole, step=abs(float(found.step)))
    return Choice(values)


def dimensions(arguments: Sequence[str], params: Mapping[str, str]) -> dict[str, Dimension]:
    """Every key of a sweep; what was typed comes before `params`, which a YAML file gives."""
    parser = OverridesParser.create()
    typed = [parser.parse_override(text) for text in arguments]
    given = [parser.parse_override(f"{key}={value}") for key, value in params.items()]
    return {override.get_key_element(): dimension(override) for override in (*given, *typed)}


def grid(arguments: Sequence[str], params: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Every combination of all values, as overrides; the last key changes fastest."""
    parser = OverridesParser.create()
    lines: dict[str, list[str]] = {}
    for text in (*(f"{key}={value}" for key, value in params.items()), *arguments):
        override = parser.parse_override(text)
        key = override.get_key_element()
        lines[key] = [f"{key}={value}" for value in listed(override)]
    return list(product(*lines.values()))


def listed(override: Override) -> tuple[str, ...]:
    """Each single value of an override. Raises ConfigError for an interval, which has no end of them."""
    found = dimension(override)
    if isinstance(found, Interval) and found.step is None:
        raise ConfigError(
            f"{override.input_line}: an interval; expected a list for a sweep of every value; "
            f"type {override.get_key_element()}=A,B,C, or add sweep=optuna to search in it"
        )
    if isinstance(found, Choice):
        return found.values
    return tuple(override.sweep_string_iterator())
