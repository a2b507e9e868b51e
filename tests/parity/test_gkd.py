"""Distillation on own and given answers: the tokens, TRL's loss on them, and the same on two ranks."""

import itertools

import pytest
import recipes
import stage_recipes
import torch
import trl_recipes
import workers

BETA, TEMPERATURE = 0.3, 1.3
BATCH = 12


@pytest.fixture(scope="module")
def line(tmp_path_factory, tiny_model_dir):
    place = tmp_path_factory.mktemp("gkd")
    recipes.write_rows(place / "chats.jsonl")
    stage_recipes.write_teacher(place / "teacher", tiny_model_dir)
    changes = {
        "stage__teacher": place / "teacher",
        "stage__temperature": TEMPERATURE,
        "loss__beta": BETA,
        "rollout__max_new_tokens": 8,
        "batch__sequences": BATCH,
        "optim__lr": 1e-3,
    }
    return recipes.overrides(tiny_model_dir, place / "chats.jsonl", place, experiment="gkd", **changes)


def steps(world, line):
    """Three steps: losses, own answers, and the first one's rows: ids, trained positions, targets."""
    from framework.config import build, compose, judging, stages
    from framework.train.meter import Meter
    from framework.train.trainer import accumulate

    run = compose.compose(line)
    prepared = build.prepare(run)
    engine = build.build_engine(prepared, world)
    stage = stages.build_stage(prepared, world, engine, judging.build_rollout(prepared, world))
    meter = Meter(world)
    losses, own, rows = [], [], []
    for step in range(3):
        (term,) = stage.next(step)
        own.append(term.stats["own_answers"])
        for batch in term.micros if step == 0 else ():
            assert batch.teacher_logps is None
            starts, segments = batch.boundaries.tolist(), batch.segments
            for segment, (start, stop) in enumerate(itertools.pairwise(starts)):
                mine = segments == segment
                places = (batch.trained[mine] - start).tolist()
                row = batch.input_ids[0, start:stop].tolist(), places, batch.targets[mine].tolist()
                rows += [row] if batch.weights[mine].sum() > 0 else []
        accumulate(engine, [term], seed=run.seed, step=step, meter=meter)
        engine.step(lr=1e-3, max_grad_norm=1.0)
        losses.append(meter.line()["loss"])
    given = {tuple(table.example(r)[0].tolist()) for table in prepared.tables for r in range(len(table))}
    return losses, own, rows, [tuple(row[0]) in given for row in rows]


@pytest.fixture(scope="module")
def alone(line):
    return workers.run(1, steps, line)[0]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_loss_is_trls_on_the_tokens_that_were_drawn(share, line, alone, tiny_model_dir):
    """2e-5, summed over examples and divided by the trained tokens of the whole step."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    whole = [*line, "stage.own_share=1"]
    losses, own, rows, given = alone if share < 1 else workers.run(1, steps, whole)[0]
    assert own[0] == BATCH if share == 1 else 0 < own[0] < BATCH
    assert sum(given) == BATCH - own[0]
    teacher = next(part.split("=", 1)[1] for part in line if part.startswith("stage.teacher="))
    models = [trl_recipes.causal(path) for path in (tiny_model_dir, teacher)]
    units, total = sum(len(places) for _, places, _ in rows), 0.0
    for ids, places, targets in rows:
        labels = torch.full((1, len(ids)), -100)
        labels[0, places] = torch.tensor(targets)
        assert [ids[place + 1] for place in places] == targets
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits for model in models]
        total += gkd.GKDTrainer.generalized_jsd_loss(
            *logits, labels=labels, beta=BETA, temperature=TEMPERATURE, num_items_in_batch=units
        ).item()
    assert losses[0] == pytest.approx(total, rel=2e-5)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_two_ranks_draw_and_learn_the_same(strategy, line, alone):
    for losses, own, _, _ in workers.run(2, steps, [*line, f"strategy={strategy}"]):
        assert own == alone[1]
        assert losses == pytest.approx(alone[0], rel=1e-5)
