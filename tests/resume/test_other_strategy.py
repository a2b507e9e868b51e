"""A run may stop under one strategy and world size and go on under another: the state is the same bits."""

import itertools
import json

import pytest
import torch
import workers

STRATEGIES = ["ddp", "fsdp", "zero3"]
STEPS, BEFORE = 4, 2


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_model_dir):
    """Dropout on, a replay share, packing: everything that has a position or a random state."""
    place = tmp_path_factory.mktemp("resume")
    rows = [
        {"prompt": f"one two {'three ' * (i % 7)}", "completion": f"four {'five ' * (i * 5 % 11)}"}
        for i in range(40)
    ]
    for name, part in {"task": rows[:30], "general": rows[30:]}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [
        f"model.path={tiny_model_dir}",
        f"data.train=[{{path: {place}/task.jsonl}}]",
        "replay=fixed",
        f"replay.sources=[{{path: {place}/general.jsonl}}]",
        "replay.fraction=0.2",
        f"data.cache_dir={place}/cache",
        "data.max_length=64",
        "batch.sequences=9",
        "batch.tokens_per_micro=96",
        "precision=fp32",
        "optim.lr=1e-3",
        f"steps={STEPS}",
        "launch.device=cpu",
    ]


def train(world, arguments, *, start, stop):
    """Train steps start..stop-1, from the run's newest checkpoint if start > 0, and save at the end."""
    from framework.config import build, compose, judging, stages
    from framework.config.stage import writes
    from framework.train.meter import Meter
    from framework.train.trainer import accumulate

    run = compose.compose(arguments)
    prepared = build.prepare(run)
    checkpoints = build.checkpointer(prepared, world)
    engine = build.build_engine(prepared, world)
    rollout = judging.build_rollout(prepared, world) if writes(run.stage) else None
    stage = stages.build_stage(prepared, world, engine, rollout)
    answer = {"losses": [], "rows": []}
    if start > 0:
        found = checkpoints.newest()
        assert found.step == start
        engine.load_state_dict(found.updates, found.read)
        stage.load_state_dict(found.state["stage"])
        answer["loaded"] = flat(engine)
    rate, meter = build.learning_rate(prepared), Meter(world)
    for step in range(start, stop):
        first = stage.loader.index
        terms = stage.next(step)
        answer["rows"].append(prepared.mixture.picks(first, stage.loader.index))
        accumulate(engine, terms, seed=run.seed, step=step, meter=meter)
        engine.step(lr=rate(step), max_grad_norm=1.0)
        answer["losses"].append(meter.line()["loss"])
    answer["saved"] = flat(engine)
    checkpoints.save(stop, engine.state_dict(), {"stage": stage.state_dict()})
    return answer


def flat(engine):
    """(name, which, start) -> this rank's slice, and the number of updates."""
    state = engine.state_dict()
    return state.updates, {
        (name, which, shard.start): values
        for name, shards in state.shards.items()
        for shard in shards
        for which, values in shard.values.items()
    }


def joined(ranks, key):
    """name, which -> the whole flattened value."""
    pieces = [item for rank in ranks for item in rank[key][1].items()]
    whole = {}
    for (name, which, start), values in sorted(pieces, key=lambda item: item[0]):
        before = whole.setdefault((name, which), torch.empty(0))
        assert len(before) == start, f"{name} {which}: a hole or an overlap at {start}"
        whole[name, which] = torch.cat([before, values])
    return whole


PAIRS = [
    ("ddp", 1, "ddp", 2), ("ddp", 2, "fsdp", 3), ("ddp", 3, "zero3", 2),
    ("fsdp", 3, "ddp", 1), ("fsdp", 2, "fsdp", 3), ("fsdp", 2, "zero3", 1),
    ("zero3", 1, "ddp", 3), ("zero3", 3, "fsdp", 2), ("zero3", 3, "zero3", 1),
]  # fmt: skip
"""All nine changes of strategy; between them every change of size among 1, 2 and 3."""


@pytest.mark.parametrize(("first", "a", "second", "b"), PAIRS)
def test_the_state_is_bitwise_and_the_next_loss_agrees(first, a, second, b, command, tmp_path):
    arguments = [*command, f"run_dir={tmp_path}"]
    before = workers.run(a, train, [*arguments, f"strategy={first}"], start=0, stop=BEFORE)
    straight = [*arguments[:-1], f"run_dir={tmp_path}/straight", f"strategy={first}"]
    expected = workers.run(a, train, straight, start=0, stop=BEFORE + 1)
    after = workers.run(b, train, [*arguments, f"strategy={second}"], start=BEFORE, stop=BEFORE + 1)

    saved, loaded = joined(before, "saved"), joined(after, "loaded")
    assert before[0]["saved"][0] == after[0]["loaded"][0] == BEFORE
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert before[0]["losses"] == expected[0]["losses"][:BEFORE]
    assert after[0]["losses"][0] == pytest.approx(expected[0]["losses"][BEFORE], rel=1e-6)
    assert before[0]["rows"] + after[0]["rows"] == expected[0]["rows"]


OTHERS = ["hsdp strategy.shard_size=2 launch.nproc=4", "fsdp_offload", "zero1", "zero2"]


def there_and_back(world, arguments, strategies):
    """One step under each strategy, every one going on from the checkpoint of the one before."""
    return [
        train(world, [*arguments, *f"strategy={strategy}".split()], start=step, stop=step + 1)
        for step, strategy in enumerate(strategies)
    ]


@pytest.mark.parametrize("strategy", OTHERS)
def test_state_goes_there_and_back_between_variations(strategy, command, tmp_path):
    """From fsdp, to and from zero3, to fsdp: the same bits at every change, and fsdp's losses."""
    size = 4 if "nproc=4" in strategy else 2
    road = ["fsdp", strategy, "zero3", strategy, "fsdp"]
    arguments = [*command, f"steps={len(road)}"]
    ranks = workers.run(size, there_and_back, [*arguments, f"run_dir={tmp_path}/a"], road)
    straight = workers.run(
        size, train, [*arguments, f"run_dir={tmp_path}/b", "strategy=fsdp"], start=0, stop=len(road)
    )
    legs = [[rank[leg] for rank in ranks] for leg in range(len(road))]
    for number, (before, after) in enumerate(itertools.pairwise(legs), start=1):
        saved, loaded = joined(before, "saved"), joined(after, "loaded")
        assert before[0]["saved"][0] == after[0]["loaded"][0] == number
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    losses = [leg[0]["losses"][0] for leg in legs]
    assert losses == pytest.approx(straight[0]["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "size", "adapter"),
    [
        ("ddp", 1, "lora"),  # one process trains replicated under all of them
        *((strategy, 2, "lora") for strategy in STRATEGIES),
        ("fsdp", 2, "qlora"),
        ("zero3", 2, "qlora"),
    ],
)
def test_the_same_strategy_and_size_go_on_bit_for_bit(strategy, size, adapter, command, tmp_path):
    arguments = [*command, "precision=bf16", f"adapter={adapter}", "adapter.dropout=0.1"]
    arguments += [f"strategy={strategy}"]
    whole = workers.run(size, train, [*arguments, f"run_dir={tmp_path}/a"], start=0, stop=STEPS)
    there = [*arguments, f"run_dir={tmp_path}/b"]
    first = workers.run(size, train, there, start=0, stop=BEFORE)
    second = workers.run(size, train, there, start=BEFORE, stop=STEPS)
    losses = first[0]["losses"] + second[0]["losses"]
    assert [loss.hex() for loss in losses] == [loss.hex() for loss in whole[0]["losses"]]
    end, expected = joined(second, "saved"), joined(whole, "saved")
    assert all(torch.equal(end[key], expected[key]) for key in expected)
