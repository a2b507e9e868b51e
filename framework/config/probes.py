"""What is watched for forgetting, before a weight is read: rows of which texts, how often, at what cost.

Built-in rows that a tokenizer or `data.max_length` cannot take, and those that are trained on, are left out
and counted. A row or question of the user's that is trained on is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from framework.config.names import nearest
from framework.config.schema import Run
from framework.config.stage import ONLINE
from framework.data import cache, leaks, probing, templates
from framework.data import tables as tokenised
from framework.data.prompts import PromptTable
from framework.data.sources import Source
from framework.data.tables import Table
from framework.errors import ConfigError, DataError, UserError
from framework.rollout.intervals import fall, questions_needed
from framework.train.retain import FEWEST, Cadence

MOST_ROWS, LEAST_ROWS = 256, 8  # of a stratum, where `retain.rows` leaves it open
SPREAD = 40  # looks over a run are enough to draw a curve
EARLY = 10  # of them in the first tenth, where most is forgotten
FEW = 10  # looks, where rows could be spent instead
FORWARDS = 3  # forward passes that a training step is worth


@dataclass(frozen=True)
class Watched:
    """Rows of one table that make a stratum."""

    name: str
    table: Table
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return int(self.table.lengths[list(self.rows)].sum())

    @property
    def identity(self) -> str:
        """Equal rows, equally tokenised."""
        return cache.fingerprint({"table": self.table.fingerprint, "rows": self.rows})


@dataclass(frozen=True)
class Probes:
    """What a run watches."""

    strata: tuple[Watched, ...]
    cadence: Cadence
    cost: float  # share of the run's computation, estimated from tokens
    left_out: Mapping[str, int]  # built-in rows by reason
    budgeted: tuple[str, ...]  # strata that a budget of forgetting binds
    asked: Mapping[str, int]  # questions by stratum
    answering: float = 0.0  # what answering these takes at most, as `cost`; it is no part of that
    doubts: tuple[str, ...] = ()  # why a budget cannot be kept, whatever is trained

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers of each look, and when there is one; JSON."""
        strata = {stratum.name: stratum.identity for stratum in self.strata}
        return {"strata": strata, "cadence": vars(self.cadence)}

    def told(self) -> str:
        """For people."""
        kinds = ", ".join(f"{stratum.name} {len(stratum.rows)}" for stratum in self.strata) or "no"
        text = (
            f"retention is measured on {kinds} rows, {self.cadence.looks()} times, every "
            f"{self.cadence.every} steps: about {self.cost:.2g} of the computation"
        )
        if self.asked:
            asked = ", ".join(f"{name} {count}" for name, count in self.asked.items())
            text += (
                f", and besides by answers to the questions {asked}: at most {self.answering:.2g} more, "
                "counted in tokens, which are slower to write than to read"
            )
        if self.left_out:
            out = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
            text += f"; of the built-in rows left out: {out}"
        return text


def prepare(
    run: Run,
    given: Sequence[Table],
    trained: Sequence[Table],
    steps: int,
    reading: Mapping[str, Any],
    questions: Sequence[PromptTable] = (),
) -> Probes | None:
    """The strata of `given` (the user's) and the built-in ones; None where nothing is to be watched.

    `trained` are all tables that are learnt from or replayed, `reading` is how tables are made of sources,
    `questions` are asked besides. Raises DataError for a row or question of the user's that is trained on.
    """
    if run.stage.name == "reward" or not (given or run.retain.builtin or questions):
        return None  # a reward model writes nothing, so it has nothing to forget of that
    left_out: Counter[str] = Counter()
    found: dict[str, Watched] = {}
    leaking = partial(leaks.find, tokenizer=reading["tokenizer"], cache_dir=reading["cache_dir"])
    learnt = [table for table in trained if not isinstance(table, PromptTable)]
    if run.retain.builtin:
        taken = {table.name for table in given}
        for table in _built_in(run, reading, left_out):
            rows = _readable(table, reading["tokenizer"], left_out)
            for other in learnt if rows else ():
                same = {leak.probe for leak in leaking(table, rows, other)}
                left_out["trained on"] += len(same)
                rows = [row for row in rows if row not in same]
            if table.name not in taken and len(rows) >= FEWEST:
                found[table.name] = Watched(table.name, table, tuple(rows))
    for table in given:
        first = range(min(len(table), run.retain.rows or MOST_ROWS))
        for other in learnt:
            if leaked := leaking(table, first, other):
                _refuse(table, other, leaked[0])
        found[table.name] = Watched(table.name, table, tuple(first))
    for table in questions:
        for other in trained:
            if leaked := leaking(table, range(len(table)), other):
                _refuse(table, other, leaked[0])
    left_out += Counter()  # without zeros
    asked = {table.name: len(table) for table in questions}
    if not (found or asked):
        return None
    strata = list(found.values())
    work = FORWARDS * _tokens_per_step(run, trained) * steps
    afforded = _afford(run, strata, steps, work, left_out)
    return replace(
        afforded,
        budgeted=_budgeted(run, tuple(table.name for table in given) or tuple(found), found, asked),
        asked=asked,
        answering=_answered(run, questions, afforded.cadence) / work,
        doubts=tuple(_doubts(run, asked)),
    )


def _budgeted(
    run: Run, usual: tuple[str, ...], found: Mapping[str, Watched], asked: Mapping[str, int]
) -> tuple[str, ...]:
    """The strata that a budget binds: those that are named, else `usual` ones, or all that are asked.

    Raises ConfigError for a name that is not watched in the unit of the budget.
    """
    by_answers = run.replay.unit == "accuracy"
    known = tuple(asked if by_answers else found)
    if not known:  # no built-in row can be read, and nothing else is watched but questions
        return ()
    bound = run.replay.bound or (known if by_answers else usual)
    if missing := [name for name in bound if name not in known]:
        close = nearest(missing[0], known) or known[0]
        each = run.replay.max_forgetting
        key, type_this = "replay.strata", f"[{close}]"
        if isinstance(each, dict):
            key, type_this = "replay.max_forgetting", f"{{{close}: {each[missing[0]]:g}}}"
        what = "no questions of the name" if by_answers else "no text of the name"
        raise ConfigError(
            f"{key}: {what} {missing[0]} {'are asked' if by_answers else 'is watched'}; expected some of "
            f"{', '.join(known)}; type '{key}={type_this}'"
        )
    return bound


def _doubts(run: Run, asked: Mapping[str, int]) -> Iterator[str]:
    """Budgets of accuracy that so many questions cannot resolve, even where none of them is lost."""
    given = run.replay.max_forgetting
    if given is None or run.replay.unit != "accuracy":
        return
    for name in run.replay.bound or asked:
        budget = given[name] if isinstance(given, dict) else given
        least = fall(0, 0, asked[name]).high
        if least > budget:
            yield (
                f"a budget of {100 * budget:.3g} points of accuracy cannot be resolved on {name}: its "
                f"{asked[name]} questions leave up to {100 * least:.3g} points open where none is lost; "
                f"expected {questions_needed(budget)} at least; give retain.prompts as many, or type "
                f"replay.max_forgetting={math.ceil(1000 * least) / 1000:g}"
            )


def _built_in(run: Run, reading: Mapping[str, Any], left_out: Counter[str]) -> list[Table]:
    """Tables of the built-in rows; a stratum of which nothing can be read is left out whole."""
    options = {**reading, "truncation": "drop", "on_bad_row": "drop", "workers": 1}
    if templates.resolve(reading["tokenizer"], reading["chat_template"]) is None:
        options["chat_template"] = "plain"  # a model that was never taught one
    read: Callable[[list[Source]], list[Table]] = partial(
        tokenised.prepare, train_on=run.data.train_on, **options
    )
    strata = probing.built_in()
    try:
        tables = read(strata)
    except UserError:
        tables = []
        for stratum in strata:
            try:
                tables += read([stratum])
            except UserError:  # no row fits, or the template cannot mark these
                left_out["over-long or not to be rendered"] += probing.ROWS
    for table in tables:
        left_out.update(table.counts.dropped)
    return tables


def _readable(table: Table, tokenizer: Any, left_out: Counter[str]) -> list[int]:
    """Rows without an unknown token: what a tokenizer cannot write is no measure of its model."""
    unknown = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    rows = list(range(len(table)))
    if unknown is None or unknown in others:
        return rows
    kept = [row for row in rows if unknown not in table.example(row)[0]]
    left_out["with letters that the tokenizer lacks"] += len(rows) - len(kept)
    return kept


def _refuse(table: Table, other: Table, leak: leaks.Leak) -> None:
    raise DataError(
        f"this row is trained on, too, as {other.where(leak.trained)} ({other.name}), so it would say "
        "nothing of what is forgotten; expected rows that are not learnt; leave it out here or there",
        path=table.where(leak.probe),
    )


def _tokens_per_step(run: Run, trained: Sequence[Table]) -> float:
    """About how many tokens pass through the model in one optimizer step."""
    rows = sum(map(len, trained))
    each = sum(float(table.lengths.sum()) for table in trained) / rows
    if run.stage.name in ONLINE:
        each += run.rollout.max_new_tokens / 2
    return each * run.batch.sequences


def _afford(
    run: Run,
    strata: list[Watched],
    steps: int,
    work: float,
    left_out: Mapping[str, int],
) -> Probes:
    """As many rows and looks as `retain.cost` of the `work` pays for; first looks are given up, then rows.

    A budget needs them all: it is held by what is measured, whatever that costs.
    """
    bound = run.replay.max_forgetting is not None
    if not strata:  # questions alone
        return Probes((), _cadence(run, steps, 2 * SPREAD), 0.0, left_out, (), {})
    most = max(len(stratum.rows) for stratum in strata)
    if run.retain.rows is not None:
        options = [run.retain.rows]
    else:
        options = [most]
        while options[-1] > LEAST_ROWS and not bound:
            options.append(max(options[-1] // 2, LEAST_ROWS))
    wanted = min(FEW, steps)
    for rows in options:
        chosen = tuple(replace(stratum, rows=stratum.rows[:rows]) for stratum in strata)
        passes = run.retain.cost * work / sum(stratum.tokens for stratum in chosen)
        if passes >= wanted + 1:
            break
    looks = passes - 1  # the start model is scored twice
    cadence = _cadence(run, steps, max(looks, 2 * SPREAD) if bound else looks)
    cost = (cadence.looks() + 1) * sum(stratum.tokens for stratum in chosen) / work
    return Probes(chosen, cadence, cost, left_out, (), {})


def _answered(run: Run, questions: Sequence[PromptTable], cadence: Cadence) -> float:
    """Tokens of all questions and their answers, these as long as they may be, each time they are asked.

    The start model is asked twice, what becomes of it at some looks and at the end.
    """
    times = 2 + cadence.number(cadence.steps - 1) // run.retain.ask_every + 1
    return times * sum(
        float(table.lengths.sum()) + len(table) * run.rollout.max_new_tokens for table in questions
    )


def _cadence(run: Run, steps: int, affordable: float) -> Cadence:
    """The closest of evenly spread looks that can be paid for."""
    if run.retain.every is not None:
        return Cadence(steps, run.retain.every)
    every = max(1, -(-steps // SPREAD))
    dense = 10 * max(1, steps // (100 * EARLY))
    while (cadence := Cadence(steps, every, dense)).looks() > max(affordable, 2) and every < steps:
        every, dense = min(2 * every, steps), 2 * dense
    return cadence if every < steps else Cadence(steps, steps, 0)
