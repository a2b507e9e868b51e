"""The built-in probe: short rows of general text on which it is measured what a model forgets.

Written for this project, a file a stratum in `probes/`; arithmetic and half of the code come from the
functions here, whose rows are those of the files. Knows no model and no measure.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framework.data.sources import Source

STRATA = ("chat", "prose", "code", "facts", "instructions", "arithmetic")
SEED = 20240229
ROWS = 24  # of each stratum
GENERATED = 12  # functions in the code stratum

Row = dict[str, Any]


def built_in() -> list[Source]:
    """A source for each stratum."""
    directory = Path(__file__).parent / "probes"
    return [Source(str(directory / f"{name}.jsonl"), name=name) for name in STRATA]


def arithmetic() -> list[Row]:
    """24 questions with short reckoned answers: sums, differences, products, quotients and small stories."""
    draw = random.Random(f"{SEED} arithmetic")
    rows = []
    for number in range(ROWS):
        kind = _KINDS[number % len(_KINDS)]
        question, answer = kind(draw)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    return rows


def _sum(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(12, 99), draw.randint(12, 99)
    return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."


def _difference(draw: random.Random) -> tuple[str, str]:
    b, rest = draw.randint(11, 80), draw.randint(5, 90)
    return f"Calculate {b + rest} - {b}.", f"{b + rest} - {b} = {rest}."


def _product(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(3, 12), draw.randint(3, 12)
    return f"How much is {a} times {b}?", f"{a} times {b} is {a * b}."


def _quotient(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(3, 12), draw.randint(3, 12)
    return f"Divide {a * b} by {a}.", f"{a * b} divided by {a} is {b}."


def _shopping(draw: random.Random) -> tuple[str, str]:
    count, price, paid = draw.randint(2, 6), draw.randint(2, 8), 50
    thing = draw.choice(("notebooks", "loaves", "tickets", "candles"))
    cost = count * price
    return (
        f"Ana buys {count} {thing} for {price} euros each and pays with a {paid} euro note. "
        "What is her change?",
        f"The {thing} cost {count} * {price} = {cost} euros, so her change is "
        f"{paid} - {cost} = {paid - cost} euros.",
    )


def _journey(draw: random.Random) -> tuple[str, str]:
    speed, hours = draw.choice((40, 50, 60, 80)), draw.randint(2, 5)
    return (
        f"A bus drives at {speed} km per hour for {hours} hours. How far does it get?",
        f"It gets {speed} * {hours} = {speed * hours} km far.",
    )


_KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _sum,
    _difference,
    _product,
    _quotient,
    _shopping,
    _journey,
)


def functions() -> list[Row]:
    """Small Python functions, each with a call and what it gives."""
    draw = random.Random(f"{SEED} code")
    rows = []
    for number in range(GENERATED):
        values = [draw.randint(-20, 20) for _ in range(draw.randint(4, 6))]
        least = draw.randint(-5, 5)
        name, body, result = (
            ("above", f"[v for v in values if v > {least}]", [v for v in values if v > least]),
            ("total_above", f"sum(v for v in values if v > {least})", sum(v for v in values if v > least)),
            ("shifted", f"[v + {least} for v in values]", [v + least for v in values]),
            ("count_below", f"sum(v < {least} for v in values)", sum(v < least for v in values)),
        )[number % 4]
        text = f"def {name}(values):\n    return {body}\n\n\nassert {name}({values}) == {result}\n"
        rows.append({"text": text})
    return rows
