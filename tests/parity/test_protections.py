"""Pulls, averages and the way back to the start: the same under every strategy, and by hand."""

import pytest
import recipes
import torch
import workers

WORLDS = [("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero3", 2)]
EWC = {"protect": "ewc", "protect__pull": 30, "protect__rows": 16}
STEPS, SHARE = 4, 0.3


def protected(world, arguments, *, steps=STEPS, stop_at=None, directory=None):
    """After some updates this rank's slices, by value and name, and all weights at SHARE of the way back.

    With `stop_at` the run is saved after so many steps and goes on in another engine.
    """
    from framework.config import build, compose, finish, stages
    from framework.train.checkpoint import Checkpointer
    from framework.train.interpolate import Line
    from framework.train.meter import Meter
    from framework.train.protect import copied
    from framework.train.trainer import accumulate

    run = compose.compose(arguments)
    prepared = build.prepare(run)

    def begin(*, resumed):
        plain = build.build_engine(prepared, world)
        start = copied(plain, device=torch.device("cpu"))
        engine = finish.Protection(prepared, world, plain, resumed=resumed).engine
        return engine, start, stages.build_stage(prepared, world, engine)

    engine, start, stage = begin(resumed=False)
    rate = build.learning_rate(prepared)
    for step in range(steps):
        if step == stop_at:
            saving = Checkpointer(directory, world=world, keep=1, identity={})
            saving.save(step, engine.state_dict(), {"stage": stage.state_dict()})
            engine, start, stage = begin(resumed=True)
            found = Checkpointer(directory, world=world, keep=1, identity={}).newest()
            engine.load_state_dict(found.updates, found.read)
            stage.load_state_dict(found.state["stage"])
        accumulate(engine, stage.next(step), seed=run.seed, step=step, meter=Meter(world))
        engine.step(lr=rate(step), max_grad_norm=run.optim.max_grad_norm)
    slices = {
        which: {
            name: [(each.shape, each.start, each.values[which]) for each in shards if which in each.values]
            for name, shards in engine.state_dict().shards.items()
        }
        for which in ("master", "average", "importance")
    }
    Line(engine, start, finish.moves).go(SHARE)
    return slices, {name: weight.clone() for name, weight in engine.weights()}


def whole(ranks, which):
    return recipes.whole([{"gradient": slices[which]} for slices, _ in ranks])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipes.write_rows(tmp_path_factory.mktemp("protections") / "rows.jsonl")


def arguments(data, model, **changes):
    general = recipes.write_rows(data.parent / "general.jsonl", rows=30, seed=1)
    changes = {"protect__average": 0.9, **EWC, "protect__sources": f"[{{path: {general}}}]", **changes}
    return recipes.overrides(model, data, data.parent, **changes)


@pytest.fixture(scope="module")
def one(data, tiny_model_dir):
    """Everything at once in one process."""
    return workers.run(1, protected, arguments(data, tiny_model_dir), timeout_s=120)


@pytest.mark.parametrize(("strategy", "size"), WORLDS)
def test_every_strategy_protects_alike(strategy, size, one, data, tiny_model_dir):
    ranks = workers.run(size, protected, arguments(data, tiny_model_dir, strategy=strategy), timeout_s=180)
    for which, tolerance in (("importance", 1e-4), ("average", 1e-4), ("master", 1e-4)):
        ours, expected = whole(ranks, which), whole(one, which)
        assert ours.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.allclose(ours[name], values, atol=tolerance * float(values.abs().max()), rtol=0), (
                which
            )
    for name, weight in one[0][1].items():
        for _, weights in ranks:
            assert torch.allclose(weights[name], weight, atol=1e-4 * float(weight.abs().max()), rtol=0)


def test_importances_have_a_mean_of_one_and_change_nothing_by_being_taken(one, data, tiny_model_dir):
    """With a pull too weak to be felt the run is the unprotected one: the moments were emptied again."""
    importance = whole(one, "importance")
    total, count = (
        sum(float(v.double().sum()) for v in importance.values()),
        sum(map(torch.numel, importance.values())),
    )
    assert total / count == pytest.approx(1.0, rel=1e-5)
    weak = workers.run(1, protected, arguments(data, tiny_model_dir, protect__pull=1e-30), timeout_s=120)
    plain = workers.run(1, protected, recipes.overrides(tiny_model_dir, data, data.parent), timeout_s=120)
    for name, values in whole(plain, "master").items():
        assert torch.allclose(whole(weak, "master")[name], values, atol=1e-7, rtol=1e-6)


def test_a_pull_is_the_step_that_its_formula_says(data, tiny_model_dir):
    """One step, rate r = 1e-3, c = 1000: w = start + (u - start) / 2 of the unprotected step's u."""
    bare = recipes.overrides(tiny_model_dir, data, data.parent)
    ((start, _),) = workers.run(1, protected, bare, steps=0, timeout_s=120)
    ((free, _),) = workers.run(1, protected, bare, steps=1, timeout_s=120)
    ((held, _),) = workers.run(
        1, protected, [*bare, "protect=l2sp", "protect.pull=1000"], steps=1, timeout_s=120
    )
    for name, ((_, _, u),) in free["master"].items():
        ((_, _, w0),), ((_, _, w),) = start["master"][name], held["master"][name]
        assert torch.allclose(w, (w0 + u) / 2, atol=1e-7, rtol=1e-6)
    assert any(
        not torch.equal(u, start["master"][name][0][2]) for name, ((_, _, u),) in free["master"].items()
    )


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 1), ("fsdp", 2)])
def test_a_protected_run_goes_on_bit_for_bit(strategy, size, data, tiny_model_dir, tmp_path):
    asked = arguments(data, tiny_model_dir, strategy=strategy)
    through = workers.run(size, protected, asked, timeout_s=120)
    resumed = workers.run(size, protected, asked, stop_at=2, directory=tmp_path / "saved", timeout_s=120)
    for which in ("importance", "average", "master"):
        for name, values in whole(through, which).items():
            assert torch.equal(whole(resumed, which)[name], values), (which, name)
    for name, weight in through[0][1].items():
        assert torch.equal(resumed[0][1][name], weight)


def test_an_adapter_goes_back_by_what_it_adds(data, tiny_model_dir):
    """A as tuned and SHARE of B: B A is then SHARE of what was learnt, exactly as W is in full training."""
    asked = recipes.overrides(tiny_model_dir, data, data.parent, adapter="lora")
    ((slices, weights),) = workers.run(1, protected, asked, timeout_s=120)
    pairs = [name for name in slices["master"] if ".lora_B." in name]
    assert pairs
    for name in pairs:
        inner = name.replace(".lora_B.", ".lora_A.")
        ((shape, _, b),), ((wide, _, a),) = slices["master"][name], slices["master"][inner]
        learnt = b.view(shape) @ a.view(wide)
        assert torch.allclose(weights[name] @ weights[inner], SHARE * learnt, atol=1e-9, rtol=1e-5)
        assert float(learnt.abs().max()) > 0


def following(data, model, **changes):
    general = recipes.write_rows(data.parent / "general.jsonl", rows=30, seed=1)
    asked = {"replay": "start", "replay__sources": f"[{{path: {general}, name: general}}]"}
    return recipes.overrides(model, data, data.parent, replay__fraction=0.4, **{**asked, **changes})


@pytest.fixture(scope="module")
def followed(data, tiny_model_dir):
    return workers.run(1, recipes.measure, following(data, tiny_model_dir), steps=4, timeout_s=120)


@pytest.mark.parametrize(("strategy", "size"), [("fsdp", 2), ("zero3", 2)])
def test_replay_that_follows_the_start_model_is_the_same_everywhere(
    strategy, size, followed, data, tiny_model_dir
):
    asked = following(data, tiny_model_dir, strategy=strategy)
    ranks = workers.run(size, recipes.measure, asked, steps=4, timeout_s=120)
    assert ranks[0]["losses"] == pytest.approx(followed[0]["losses"], rel=1e-4)


def test_replay_that_follows_the_start_model_begins_with_a_divergence_of_zero(followed, data, tiny_model_dir):
    """Of the first step's loss the share of the own rows is left, three fifths of what both cost as text."""
    text = workers.run(
        1, recipes.measure, following(data, tiny_model_dir, replay="fixed"), steps=1, timeout_s=120
    )
    assert 0.5 < followed[0]["losses"][0] / text[0]["losses"][0] < 0.7
