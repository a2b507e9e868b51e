"""Small real runs of the stages that learn from judgements, for any number of ranks and any strategy."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import judged

PROMPTS, LIKED, DISLIKED = range(10, 60), range(60, 110), range(110, 160)  # ranges of token ids
STEP = 8  # rows of an optimizer step


def rows_of(seed: int, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of uneven lengths; what is chosen shows in the answers' tokens."""
    draw = random.Random(seed)

    def say(ids: range, most: int) -> list[int]:
        return draw.choices(ids, k=draw.randint(1, most))

    return [(say(PROMPTS, 9), say(LIKED, 7), say(DISLIKED, 7)) for _ in range(count)]


def single(rows: Any) -> list[tuple[list[int], list[int], bool]]:
    """The same as labelled answers, one of each pair in turn."""
    return [(p, c, True) if n % 2 == 0 else (p, r, False) for n, (p, c, r) in enumerate(rows)]


def steps_of(rows: list[Any]) -> list[list[Any]]:
    return [rows[at : at + STEP] for at in range(0, len(rows), STEP)]


def strategy_of(world: Any, name: str, **options: Any) -> Any:
    from framework.strategy.ddp import Ddp
    from framework.strategy.fsdp2 import Fsdp
    from framework.strategy.zero import Zero

    options = {"precision": "fp32", **options}
    if name == "zero3":
        return Zero(world, stage=3, **options)
    return {"ddp": Ddp, "fsdp": Fsdp}[name](world, **options)


def model_of(model: Any, world: Any, *, head: str = "lm", adapter: bool = False) -> tuple[Any, Any]:
    """(build, weights) of the tiny Llama, with LoRA where an adapter is asked for."""
    from framework.models import load

    description = load.inspect(str(model), head=head)
    lora = {"rank": 4, "alpha": 8.0} if adapter else None
    attention = load.attention_for(description, "auto", world.device, precision="fp32")
    build = load.builder(description, attention=attention, head_chunk_tokens=16, adapter=lora)
    return build, load.reader(description, adapter=lora, seed=1)


def engine_of(world: Any, model: Any, strategy: str, **options: Any) -> Any:
    from framework.train.optim import adamw

    build, weights = model_of(model, world, **options)
    optimizer = partial(adamw, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    return strategy_of(world, strategy).train(build, weights, optimizer)


def reference_of(kind: str, engine: Any, strategy: str, model: Any, root: Any, batches: Any) -> Any:
    from framework.stages.coupling import policy_logps
    from framework.stages.reference import AdapterOff, FrozenCopy, cached

    if kind == "adapter":
        return AdapterOff(engine)
    if kind == "frozen":
        return FrozenCopy(strategy_of(engine.world, strategy).freeze(*model_of(model, engine.world)))
    ask = partial(policy_logps, engine)
    return cached(root, {"model": "tiny"}, batches, ask=ask, world=engine.world)


def train(stage: Any, engine: Any, steps: range, lr: float = 1e-3) -> list[dict[str, float]]:
    """The log line of each step."""
    from framework.train.meter import Meter
    from framework.train.trainer import accumulate

    meter, lines = Meter(engine.world), []
    for step in steps:
        accumulate(engine, stage.next(step), seed=0, step=step, meter=meter)
        engine.step(lr=lr, max_grad_norm=1.0)
        lines.append(meter.line())
    return lines


def preference(
    world: Any,
    model: Any,
    strategy: str,
    loss: Callable[..., Any],
    *,
    root: Any = None,
    reference: str = "frozen",
    adapter: bool = False,
    steps: int = 5,
    lr: float = 1e-3,
) -> dict[str, Any]:
    """Losses and held-out metrics of a preference run on pairs."""
    from framework.stages.preference import PairObjective, Preference
    from framework.train.evaluate import evaluate

    rows, held = rows_of(0, steps * STEP), rows_of(1, 12)
    engine = engine_of(world, model, strategy, adapter=adapter)
    loader = judged.Steps(steps_of(rows), judged.pairs, world)
    held_out = judged.share(held, world.rank, world.size, judged.pairs)
    batches = judged.share(rows + held, world.rank, world.size, judged.pairs)
    asked = reference_of(reference, engine, strategy, model, root, batches)
    stage = Preference(loader, PairObjective(loss), {"held": held_out}, engine=engine, reference=asked)
    before = evaluate(engine, stage.held_out())
    lines = train(stage, engine, range(steps), lr)
    return {"lines": lines, "before": before, "after": evaluate(engine, stage.held_out())}


def unpaired(
    world: Any,
    model: Any,
    strategy: str,
    loss: Callable[..., Any],
    *,
    steps: int = 5,
    stop: int | None = None,
) -> dict[str, Any]:
    """The same on single answers; `stop` makes the run go on in a new stage from there."""
    from framework.stages.unpaired import AnswerObjective, Asked, Unpaired
    from framework.train.evaluate import evaluate

    rows, held = single(rows_of(0, steps * STEP)), single(rows_of(1, 12))
    engine = engine_of(world, model, strategy)
    reference = reference_of("frozen", engine, strategy, model, None, None)
    share = partial(judged.share, rank=world.rank, size=world.size, make=judged.labelled)
    running = loss.func.__name__ == "bco"

    def stage_of() -> Any:
        return Unpaired(
            judged.Steps(steps_of(rows), judged.labelled, world, mismatch=judged.rotated),
            AnswerObjective(loss),
            {"held": Asked(share(held), share(judged.rotated(held)))},
            engine=engine,
            reference=reference,
            baseline="running" if running else "mismatched",
            beta=loss.keywords["beta"],
        )

    stage = stage_of()
    lines = train(stage, engine, range(stop or steps))
    if stop is not None:
        state, stage = stage.state_dict(), stage_of()
        stage.load_state_dict(state)
        lines += train(stage, engine, range(stop, steps))
    return {"lines": lines, "after": evaluate(engine, stage.held_out())}


def reward(
    world: Any, model: Any, strategy: str, loss: Callable[..., Any], *, steps: int = 5, lr: float = 1e-3
) -> dict[str, Any]:
    """Losses and held-out metrics of a reward model."""
    from framework.stages.reward import Reward, RewardObjective
    from framework.train.evaluate import evaluate

    rows, held = rows_of(0, steps * STEP), rows_of(1, 12)
    engine = engine_of(world, model, strategy, head="score")
    make = partial(judged.pairs, scored=True)
    stage = Reward(
        judged.Steps(steps_of(rows), make, world),
        RewardObjective(loss),
        {"held": judged.share(held, world.rank, world.size, make)},
        engine=engine,
    )
    ((_, baselines),) = stage.reports()
    before = evaluate(engine, stage.held_out())
    lines = train(stage, engine, range(steps), lr)
    after = evaluate(engine, stage.held_out())
    return {"lines": lines, "before": before, "after": after, **baselines, "moments": stage.moments()["held"]}


WORDS = "the capital of France is Paris one two three four five words list story".split()


def write_comparisons(path: Any, count: int = 24) -> None:
    """Pairs and rankings of three answers, in words."""
    draw = random.Random(0)

    def say(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    with path.open("w") as file:
        for row in range(count):
            answers = [f"{say(6)} {n}" for n in range(3 if row % 3 == 0 else 2)]
            file.write(
                json.dumps({"prompt": [{"role": "user", "content": say(9)}], "responses": answers}) + "\n"
            )


def write_labelled(path: Any, count: int = 24) -> None:
    """Single answers in words, every other one liked."""
    draw = random.Random(0)
    with path.open("w") as file:
        for row in range(count):
            prompt, answer = (" ".join(draw.choices(WORDS, k=draw.randint(1, 7))) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": answer, "label": row % 2 == 0}) + "\n")


def loader_of(world: Any, table: Any, *, packing: bool, **kinds: Any) -> Any:
    from framework.data.loader import Loader
    from framework.data.mixture import Group, Mixture

    return Loader(
        [table],
        Mixture(Group([table.trained]), seed=0),
        sequences=STEP,
        tokens_per_micro=120,
        packing=packing,
        rank=world.rank,
        world_size=world.size,
        pad_id=0,
        **kinds,
    )


def from_files(world: Any, model: Any, root: Any) -> dict[str, Any]:
    """Losses of a weighted sum of losses over pairs and rankings, in three layouts."""
    from framework.data import answers
    from framework.data.loader import held_out
    from framework.data.pairs import Pairs
    from framework.data.sources import Source
    from framework.losses.mixed import mixed
    from framework.models import load
    from framework.stages.coupling import policy_logps
    from framework.stages.preference import PairObjective, Preference
    from framework.stages.reference import cached

    tokenizer = load.inspect(str(model)).tokenizer
    (table,) = answers.prepare_comparisons(
        [Source(str(root / "rows.jsonl"))],
        tokenizer=tokenizer,
        max_length=128,
        cache_dir=root / f"{world.size}",
    )
    loss = partial(
        mixed,
        losses={"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0},
        keywords={"dpo": {"beta": 0.5}, "bco_pair": {"beta": 0.5}},
    )
    losses, asked = [], []
    for name in ("shared", "packed", "padded"):
        engine = engine_of(world, model, "ddp")
        kind, packing = Pairs(sharing=name == "shared"), name != "padded"

        def ask(batches: Any, name: str = name, engine: Any = engine) -> Any:
            asked.extend([] if name in asked else [name])
            return policy_logps(engine, batches)

        there = dict(rank=world.rank, world_size=world.size, pad_id=0)
        micros = held_out(table, tokens_per_micro=200, packing=packing, kind=kind, **there)
        reference = cached(root / f"columns-{world.size}", {"model": "tiny"}, micros, ask=ask, world=world)
        loader = loader_of(world, table, packing=packing, kind=kind)
        stage = Preference(loader, PairObjective(loss), {"held": micros}, engine=engine, reference=reference)
        losses.append([line["loss"] for line in train(stage, engine, range(3))])
    return {"losses": losses, "asked": asked}


def labelled_from_files(world: Any, model: Any, root: Any, loss: Any) -> list[float]:
    from framework.data import answers
    from framework.data.loader import Cut, whole
    from framework.data.pairs import Labelled, Mismatched
    from framework.data.sources import Source
    from framework.models import load
    from framework.stages.unpaired import AnswerObjective, Unpaired
    from framework.train.evaluate import evaluate

    tokenizer = load.inspect(str(model)).tokenizer
    (table,) = answers.prepare_labelled(
        [Source(str(root / "rows.jsonl"))],
        tokenizer=tokenizer,
        max_length=128,
        cache_dir=root / f"{world.size}",
    )
    engine = engine_of(world, model, "ddp")
    kinds = dict(kind=Labelled(), mismatched=Mismatched(max_length=128))
    cut = Cut(120, True, world.rank, world.size, 0)
    stage = Unpaired(
        loader_of(world, table, packing=True, **kinds),
        AnswerObjective(loss),
        {"held": whole(table, cut, **kinds)},
        engine=engine,
        reference=reference_of("frozen", engine, "ddp", model, None, None),
        baseline="running" if loss.func.__name__ == "bco" else "mismatched",
        beta=loss.keywords["beta"],
    )
    losses = [line["loss"] for line in train(stage, engine, range(3))]
    return [*losses, evaluate(engine, stage.held_out())["held/loss"]]
