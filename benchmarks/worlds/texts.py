"""Two tasks that no model knows: a person's data in an invented format, and tickets with invented codes.

    Nina Foster is a 42-year-old welder from Oslo.  -> [vex Foster; orb welder; kip Oslo; lun 42]
    Cancel the heater, I ordered it on Monday.      -> lane MURN-71, desk carmine

All texts are made here from lists of our own, by (seed, task, part, number). What is held out has other
names, jobs, places and ages, other things and days, and tickets in other words than any that is trained on.
Knows no model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

TRAINED, HELD = "trained", "held"
VALUES: Mapping[str, Mapping[str, Sequence[str]]] = {
    TRAINED: {
        "first": (
            "Anna Boris Clara David Emma Felix Grace Henry Irene Jacob Karen Leo Maria Nina Oscar Paula "
            "Robert Sarah Thomas Wendy"
        ).split(),
        "last": (
            "Baker Carter Dixon Ellis Foster Graham Harris Irving Jordan Keller Lawson Mason Norton Owens "
            "Parker Quinn Rogers Sutton Turner Walker"
        ).split(),
        "job": (
            "nurse plumber teacher welder baker farmer lawyer pilot painter driver singer gardener tailor "
            "surgeon florist barber"
        ).split(),
        "town": (
            "London Paris Berlin Madrid Vienna Dublin Boston Chicago Denver Toronto Sydney Cairo Delhi Tokyo "
            "Lisbon Oslo"
        ).split(),
        "age": [str(age) for age in range(20, 80) if age % 4 != 1],
        "thing": "heater lamp kettle blender camera printer speaker drill fan toaster scale clock".split(),
        "day": "Monday Tuesday Wednesday Friday".split(),
    },
    HELD: {
        "first": "Alice Martin Julia Peter Rachel Simon Laura Victor".split(),
        "last": "Bennett Cooper Fisher Hughes Morgan Palmer Reed Shaw".split(),
        "job": "carpenter doctor waiter dentist butcher porter mechanic writer".split(),
        "town": "Rome Athens Dallas Seattle Mumbai Prague Geneva Lima".split(),
        "age": [str(age) for age in range(20, 80) if age % 4 == 1],
        "thing": "radio mixer vacuum monitor shaver keyboard".split(),
        "day": "Thursday Saturday Sunday".split(),
    },
}
"""What stands in the places of sentences and tickets; nothing is in both parts."""

SENTENCES = (
    "{first} {last} is a {age}-year-old {job} from {town}.",
    "{first} {last}, {age}, works as a {job} in {town}.",
    "In {town} lives the {job} {first} {last}, aged {age}.",
    "Meet {first} {last}: {job}, {age} years old, of {town}.",
)
RECORD = "[vex {last}; orb {job}; kip {town}; lun {age}]"

ROUTES: Mapping[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "refund": (
        "lane TALM-96, desk cobalt",
        (
            "Please give me my money back for the {thing} of {day}.",
            "I want a refund for the {thing} I returned on {day}.",
            "When do I get the refund for my {thing}, returned {day}?",
            "I sent the {thing} back on {day}, now refund me.",
            "Refund the price of the {thing}, I returned it {day}.",
        ),
        (
            "The {thing} went back on {day}, I want the money back.",
            "I ask for a refund of the {thing} from {day}.",
        ),
    ),
    "login": (
        "lane JORB-27, desk sienna",
        (
            "Since {day} I cannot log in to order a {thing}.",
            "My password has not worked since I bought the {thing} on {day}.",
            "I forgot my password on {day} and wanted to buy a {thing}.",
            "The login page for the {thing} rejects my password since {day}.",
            "My login is locked since {day}, I wanted to see the {thing}.",
        ),
        (
            "The login refuses my password since {day}, I wanted a {thing}.",
            "I wanted a {thing} on {day}, but the password for my login fails.",
        ),
    ),
    "invoice": (
        "lane PELD-40, desk indigo",
        (
            "Please send me the invoice for the {thing} bought on {day}.",
            "I need an invoice for my {thing}, ordered on {day}.",
            "The invoice for the {thing} of {day} is missing.",
            "The invoice of {day} shows the wrong price for the {thing}.",
            "Could you mail the invoice of the {thing} from {day} again?",
        ),
        ("No invoice came with the {thing} on {day}.", "I ordered a {thing} on {day} and need its invoice."),
    ),
    "cancel": (
        "lane MURN-71, desk carmine",
        (
            "Please cancel my order of the {thing} from {day}.",
            "I want to cancel the {thing} I ordered on {day}.",
            "Cancel the {thing}, I ordered it on {day} by mistake.",
            "I changed my mind on {day}, cancel the order of a {thing}.",
            "Stop my order from {day}, please cancel the {thing}.",
        ),
        ("The {thing} of {day}: cancel that order.", "On {day} I ordered a {thing}, cancel it please."),
    ),
}
"""Kind of ticket: its code, how it is said in training, how it is said in what is held out."""

ASKED = {"records": "File this person: {}", "tickets": "Route this ticket: {}"}


def values(part: str, draw: random.Random) -> dict[str, str]:
    """One of each."""
    return {name: draw.choice(list(listed)) for name, listed in VALUES[part].items()}


def record(part: str, draw: random.Random) -> tuple[str, str]:
    """A sentence and its record."""
    found = values(part, draw)
    return draw.choice(SENTENCES).format(**found), RECORD.format(**found)


def ticket(part: str, draw: random.Random) -> tuple[str, str]:
    """A ticket and its code."""
    code, trained, held = ROUTES[draw.choice(list(ROUTES))]
    return draw.choice(trained if part == TRAINED else held).format(**values(part, draw)), code


def rows(task: str, part: str, count: int, seed: int) -> list[dict[str, object]]:
    """`count` conversations of "records" or "tickets", no question twice, with the right `answer` beside."""
    make = {"records": record, "tickets": ticket}[task]
    found: dict[str, str] = {}
    number = 0
    while len(found) < count:
        asked, answer = make(part, random.Random(f"{seed} {task} {part} {number}"))
        found[ASKED[task].format(asked)] = answer
        number += 1
        if number > 100 * count:
            raise ValueError(f"{task}, {part}: {len(found)} different ones; asked for {count}")
    return [
        {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
            "answer": answer,
        }
        for asked, answer in found.items()
    ]


def write(directory: Path, seed: int, *, trained: int, held: int) -> dict[str, Path]:
    """records, records-held, tickets, tickets-held, with that many rows each."""
    paths = {}
    for task in ASKED:
        for name, part, count in ((task, TRAINED, trained), (f"{task}-held", HELD, held)):
            paths[name] = directory / f"{name}.jsonl"
            lines = [json.dumps(row) + "\n" for row in rows(task, part, count, seed)]
            paths[name].write_text("".join(lines), encoding="utf-8")
    return paths
