"""What every rank does to write rows of a start model: `python -m framework.config.making ORDER.json`

A wave of drafts at a time: the model answers, what is of no use falls away, rank 0 writes the wave down. The
same rows on any number of ranks, and after a stop.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from framework.cluster import worker
from framework.config import drafts
from framework.config.drafts import Planned
from framework.config.journal import Journal, Wave
from framework.config.synthesis import Order
from framework.data import reading
from framework.data.likeness import Seen
from framework.data.records import parse
from framework.errors import DONE
from framework.keyed import key
from framework.models import load
from framework.rollout.asking import Draft, Writer
from framework.rollout.base import Completion, Sampling
from framework.rollout.hf import HfRollout
from framework.rollout.pool import Limits, Pool, Question
from framework.rollout.sifting import Rules
from framework.strategy.base import World
from framework.strategy.world import connect

CHUNKS = 8  # of `batch_size` in the largest wave: as many ranks share it
FEWEST = 16  # drafts of a wave
TRIES = 20  # drafts for each row that is wanted, before the model is given up
PASSES = 1.0  # what an answer must score to be kept, as verifiers count
SCORERS = 2  # processes


def inspect(order: Order) -> load.Description:
    """Look at the model. Raises ModelError."""
    model = order.model
    return load.inspect(model.path, revision=model.revision, gguf_file=model.gguf_file, init=model.init)


def home(order: Order) -> Path:
    """Where streams of start models are kept."""
    return Path(order.cache_dir).expanduser() / "synthesised"


def enough(plan: Planned, journal: Journal) -> bool:
    """Whether a stream has what is wanted of it, or has ended."""
    most = plan.beginning.most
    return journal.tried >= most if most is not None else len(journal.rows) >= plan.rows


def given_up(plan: Planned, journal: Journal) -> bool:
    """Whether trying on is of no use."""
    return journal.tried >= TRIES * plan.rows + FEWEST * CHUNKS


def make(order: Order, world: World) -> None:
    """Write every stream of `order` as far as it is wanted. Collective."""
    description = inspect(order)
    wanted = drafts.plans(order, description)
    rollout = HfRollout(
        partial(load.unfilled, description),
        description.tokenizer,
        world,
        batch_size=order.synthesis.batch_size,
        dtype=load.DTYPES[order.precision],
    )
    rollout.update(load.reader(description)(), version=0)
    chosen = order.synthesis
    sampling = Sampling(
        chosen.max_new_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        seed=key(chosen.seed, "synthesis", order.part),
    )
    for plan in wanted:
        rules = Rules.of(description.tokenizer, plan.marks, chosen.min_new_tokens)
        writer = Writer(rollout, description.tokenizer, sampling, rules)
        path = home(order) / f"{plan.key}.jsonl"
        journal = _read(path, world)
        with_score = partial(scored, order, world) if order.score is not None else None
        stream(plan, journal, writer, world, batch_size=chosen.batch_size, score=with_score)
        if not enough(plan, journal):
            break  # it was given up, and the order with it


def stream(
    plan: Planned,
    journal: Journal,
    writer: Writer,
    world: World,
    *,
    batch_size: int,
    score: Any = None,
) -> None:
    """Go on with a stream until there is enough of it. Collective."""
    seen = Seen()
    for earlier in journal.rows:
        seen.add(said(earlier))
    while not (enough(plan, journal) or given_up(plan, journal)):
        indices = range(journal.tried, journal.tried + _size(plan, journal, batch_size))
        found = plan.beginning.drafts(indices, writer)
        asked = [draft for draft in found.drafts if draft.ids]
        answers = dict(zip((d.index for d in asked), writer.answers(asked), strict=True))
        passing = score(asked, answers) if score is not None else None
        rows: list[Mapping[str, Any]] = []
        dropped = Counter(found.dropped)
        for draft in found.drafts:
            row, fault = _row(plan, draft, answers.get(draft.index), passing)
            if plan.kind != "refresh" and row is not None:
                fault = seen.add(said(row))
            if fault is not None:
                dropped[fault] += 1
            if row is not None and (fault is None or plan.kind == "refresh"):
                rows.append(row)
        journal.note(Wave(len(indices), tuple(rows), dict(dropped + Counter())))
        if world.rank == 0:
            journal.write(journal.waves[-1])
            told = f"{plan.kind}: {min(len(journal.rows), plan.rows)} of {plan.rows} rows"
            print(f"{told}, {journal.tried} tried", file=sys.stderr, flush=True)


def scored(
    order: Order, world: World, asked: Sequence[Draft], answers: Mapping[int, tuple[Completion, str | None]]
) -> dict[int, bool]:
    """Whether each answer passes, by its draft's number; one that cannot be judged does not. Collective."""
    assert order.score is not None
    verdicts: list[float | None] = []
    if world.rank == 0:
        rows = [row for source in order.refresh for row in reading.asked(drafts.as_source(source))]
        pool = Pool(order.score.target, order.score.keywords, workers=SCORERS, limits=Limits())
        try:
            given = [answers[draft.index][0] for draft in asked]
            questions = [
                Question(answer.text, rows[draft.index].row, len(answer.ids), answer.finished)
                for draft, answer in zip(asked, given, strict=True)
            ]
            values = pool.judge(questions).values
        finally:
            pool.close()
        verdicts = [None if math.isnan(value) else value for value in values]  # JSON has no NaN
    verdicts = world.broadcast(verdicts)
    pairs = zip(asked, verdicts, strict=True)
    return {draft.index: value is not None and value >= PASSES for draft, value in pairs}


def _row(
    plan: Planned,
    draft: Draft,
    answer: tuple[Completion, str | None] | None,
    passing: Mapping[int, bool] | None,
) -> tuple[dict[str, Any] | None, str | None]:
    """The whole row of a draft, and what was wrong with the model's answer."""
    completion, fault = answer or (None, "request over-long")
    if fault is None and passing is not None and not passing[draft.index]:
        fault = "not passed"
    text, by = (
        (completion.text, "model") if completion is not None and fault is None else (draft.gold, "gold")
    )
    if text is None:
        return None, fault
    made = {"kind": plan.kind, "number": draft.index, **({"answer": by} if plan.kind == "refresh" else {})}
    row: dict[str, Any] = {**draft.row, "made": made}
    if "messages" in row:
        row["messages"] = [*row["messages"], {"role": "assistant", "content": text.strip()}]
    elif "prompt" in row:
        row["completion"] = text
    else:
        row["text"] = text
    return row, fault


def said(row: Mapping[str, Any]) -> str:
    format = "messages" if "messages" in row else "text" if "text" in row else "prompt_completion"
    return reading.said(parse(row, format))


def _size(plan: Planned, journal: Journal, batch_size: int) -> int:
    """Drafts of the next wave: about as many as it takes, by what came of the earlier ones."""
    largest = CHUNKS * batch_size
    if plan.beginning.most is not None:
        return min(largest, plan.beginning.most - journal.tried)
    kept = len(journal.rows)
    yielded = (kept + 1) / (journal.tried + 1)
    return min(largest, max(FEWEST, math.ceil((plan.rows - kept) / yielded)))


def _read(path: Path, world: World) -> Journal:
    """Rank 0 reads for all: the others may see the file grow."""
    waves = Journal(path).waves if world.rank == 0 else []
    told = world.broadcast([vars(wave) for wave in waves])
    return Journal(path, [Wave(w["tried"], tuple(w["rows"]), w["dropped"]) for w in told])


def work(order: Order) -> int:
    """One rank of a gang. Returns the exit status."""
    if order.launch.threads is not None:
        torch.set_num_threads(order.launch.threads)
    world = connect(order.launch.device, timeout_s=order.launch.timeout_s)
    try:
        make(order, world)
        world.barrier()
    finally:
        world.close()
    return DONE


if __name__ == "__main__":
    worker.run(lambda: work(Order.model_validate_json(Path(sys.argv[1]).read_text())))
