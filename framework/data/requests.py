"""Built-in requests of six kinds for a start model to answer: everyday topics in many forms.

Written for this project, the kinds those of `probing`. Each kind has two parts that share no topic, task or
sum: what is answered to be trained on, and what is answered to measure. Knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from framework.data.probing import STRATA
from framework.keyed import key

Part = Literal["train", "probe"]


class Request(NamedTuple):
    """What is asked."""

    stratum: str  # one of probing.STRATA
    text: str


FORMS = {
    "chat": (
        "Tell me something about {}.",
        "I have been thinking about {} lately. What is worth knowing?",
        "What do people often get wrong about {}?",
        "Why do some people like {}, and others not at all?",
        "Can we talk about {} for a moment?",
        "A friend asked me about {} and I had no answer. What would you have said?",
    ),
    "prose": (
        "Write a short story in which {} plays a part.",
        "Describe {} for a reader who has never seen or heard of such a thing.",
        "Write a short poem about {}.",
        "Write the first paragraph of an article about {}.",
        "Describe {} to a child in a few words.",
    ),
    "facts": (
        "Name three facts about {}.",
        "Explain {} in two or three sentences.",
        "What is the history of {}, in brief?",
        "What good is there in {}? Answer in one or two sentences.",
        "What is special about {}?",
    ),
    "instructions": (
        "List five tips for somebody who wants to know more about {}.",
        "Write a short letter to a newspaper about {}.",
        "Give a beginner one useful piece of advice about {}.",
        "Write three quiz questions about {} with their answers.",
        "Summarise what a school lesson on {} should contain.",
        "Make a table with two columns, pros and cons, for a debate about {}.",
    ),
}
"""Stratum -> forms of a request about a topic."""

TOPICS = (
    "the water cycle", "bicycles", "healthy breakfasts", "the Roman Empire", "photosynthesis", "the piano",
    "electric cars", "bees", "bridges", "saving money", "the Moon", "sleep", "chess", "bread baking",
    "the human heart", "libraries", "recycling", "the Amazon rainforest", "letters on paper", "gravity",
    "dogs", "the printing press", "earthquakes", "gardens in spring", "public speaking", "antibiotics",
    "trains", "Leonardo da Vinci", "coral reefs", "computers", "tea", "mountain climbing",
    "the stock market", "vaccines", "watercolours", "the Great Wall of China", "batteries", "teamwork",
    "wind power", "birds in winter", "job interviews", "the Olympic Games", "glass", "swimming",
    "the brain", "rice", "penguins", "time zones", "the theatre", "maps", "honey", "the sea", "jealousy",
    "the violin", "submarines", "clouds", "taxes", "the Silk Road", "mushrooms", "patience",
    "the metric system", "shoes", "the kidney", "elections", "Marie Curie", "deserts", "soap", "the guitar",
    "winter sports", "dreams", "the alphabet", "cats", "paper", "the ozone layer", "neighbours", "camels",
    "the telephone", "sugar", "the Vikings", "forests", "wool", "insurance", "the microscope", "traffic",
    "noise", "mathematics at school", "houseplants", "the Nile", "comets", "bicycle tours", "jazz",
    "forgetting names", "the violet", "steel", "beaches", "holidays at home", "the eye", "horses",
    "markets", "ice cream", "lighthouses", "the number zero", "museums", "salmon",
)  # fmt: skip
PROBE_TOPICS = (
    "volcanoes", "the French Revolution", "running", "whales", "aeroplanes", "friendship", "salt",
    "the internet", "tomatoes", "Mozart", "the immune system", "desert animals", "coffee", "democracy",
    "lightning", "reading to children", "the planet Mars", "first aid", "cotton", "football", "passwords",
    "rivers", "the pyramids", "yoga", "the compass", "grandparents", "owls", "the calendar", "chocolate",
    "satellites", "rain", "cities at night",
)  # fmt: skip

LANGUAGES = ("Python", "JavaScript", "C", "Java", "a language of your choice")
TASKS = (
    "reverses a string", "finds the largest number in a list", "counts the words of a text",
    "checks whether a number is prime", "sorts a list of names", "adds up the digits of a number",
    "removes duplicates from a list", "converts Celsius to Fahrenheit", "computes a factorial",
    "reads a file line by line", "finds the longest word in a sentence",
    "checks whether a word is a palindrome", "merges two sorted lists",
    "counts how often each letter occurs", "prints a multiplication table", "finds the median of a list",
    "searches a sorted list for a value", "prints the first Fibonacci numbers", "splits a list into chunks",
    "replaces spaces with underscores",
)  # fmt: skip
PROBE_TASKS = (
    "counts the vowels of a word", "finds the second smallest number of a list",
    "rotates a list by one place", "checks whether a year is a leap year",
    "writes the numbers from ten to one", "computes the average of a list",
    "finds the common elements of two lists", "turns a date into a weekday",
)  # fmt: skip

SUMS = (
    "What is {a} + {b}?",
    "What do {a} and {b} add up to? Show how you get there.",
    "A shop has {a} apples and gets {b} more. How many are there then?",
    "I have {both} coins and give away {a}. How many do I keep?",
)
MOST = 200  # the largest of two numbers


def request(part: Part, index: int) -> Request:
    """Number `index` of a stream without end: the kinds take turns, each in an order of its own.

    A kind that has been asked through begins again; another answer is drawn then.
    """
    stratum, turn = STRATA[index % len(STRATA)], index // len(STRATA)
    if stratum == "arithmetic":
        return Request(stratum, _sum(part, turn))
    listed = _listed(part, stratum)
    round_, place = divmod(turn, len(listed))
    order = list(range(len(listed)))
    random.Random(key(round_, "requests", part, stratum)).shuffle(order)
    return Request(stratum, listed[order[place]])


def _listed(part: Part, stratum: str) -> Sequence[str]:
    if stratum == "code":
        tasks = TASKS if part == "train" else PROBE_TASKS
        return [f"Write a function in {language} that {task}." for task in tasks for language in LANGUAGES]
    topics = TOPICS if part == "train" else PROBE_TOPICS
    return [form.format(topic) for topic in topics for form in FORMS[stratum]]


def _sum(part: Part, turn: int) -> str:
    """Sums whose second number is a multiple of four are for probes alone."""
    draw = random.Random(key(turn, "sums", part))
    a, b = draw.randint(3, MOST), 4 * draw.randint(1, MOST // 4)
    b += 0 if part == "probe" else draw.randint(1, 3)
    return SUMS[turn % len(SUMS)].format(a=a, b=b, both=a + b)
