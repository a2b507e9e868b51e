"""Real runs on a tiny Llama: the same curve on 1 and 2 ranks, references that agree, and learning."""

from functools import partial

import judged_runs
import pytest
import torch
import workers

from framework.losses.aot import aot
from framework.losses.bco import bco
from framework.losses.dpo import dpo
from framework.losses.items import Items
from framework.losses.kto import kto
from framework.losses.orpo import orpo
from framework.losses.reward import bradley_terry

DPO = partial(dpo, beta=0.5)
ON_TWO = [(name, strategy) for name in ("dpo", "kto", "reward") for strategy in ("ddp", "fsdp")]


def curve(result, name="loss"):
    return [line[name] for line in result["lines"]]


@pytest.fixture(scope="module")
def alone(tiny_model_dir):
    """Runs on one rank by name, made once: each is what the others are held to."""
    made = {}
    kinds = {
        "dpo": partial(judged_runs.preference, loss=DPO),
        "kto": partial(judged_runs.unpaired, loss=partial(kto, beta=0.5)),
        "bco": partial(judged_runs.unpaired, loss=partial(bco, beta=0.5)),
        "aot": partial(judged_runs.preference, loss=partial(aot, beta=0.5)),
        "orpo": partial(judged_runs.preference, loss=partial(orpo, beta=0.5)),
        "reward": partial(judged_runs.reward, loss=bradley_terry),
    }

    def get(name):
        if name not in made:
            kind = kinds[name]
            function = kind.func
            made[name] = workers.run(1, function, tiny_model_dir, "ddp", **kind.keywords)[0]
        return made[name], partial(workers.run, 2, kinds[name].func, tiny_model_dir, **kinds[name].keywords)

    return get


@pytest.mark.parametrize(("name", "strategy"), [*ON_TWO, ("dpo", "zero3")])
def test_two_ranks_learn_what_one_learns(name, strategy, alone):
    expected, on_two = alone(name)
    ranks = on_two(strategy=strategy)
    assert curve(ranks[0]) == pytest.approx(curve(expected), rel=1e-4)
    assert [curve(rank) for rank in ranks] == [curve(ranks[0])] * 2
    for key, value in expected["after"].items():
        assert ranks[0]["after"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        assert ranks[1]["after"][key] == ranks[0]["after"][key]


@pytest.mark.parametrize("name", ["bco", "aot", "orpo"])
def test_what_couples_a_step_is_the_same_on_two_ranks(name, alone):
    expected, on_two = alone(name)
    ranks = on_two(strategy="ddp")
    assert curve(ranks[0]) == pytest.approx(curve(expected), rel=1e-4)
    assert curve(ranks[1]) == curve(ranks[0])


def test_ktos_baseline_moves_away_from_zero(alone):
    """Guards the parity above: with a baseline of 0 throughout it would say little."""
    result, _ = alone("kto")
    baselines = curve(result, "baseline")
    assert baselines[0] == 0.0
    assert max(baselines) > 1e-3


def test_the_first_loss_of_dpo_is_that_of_a_coin(alone):
    """Policy and reference are one model: -log s(0) = log 2."""
    result, _ = alone("dpo")
    assert curve(result)[0] == pytest.approx(0.6931472, rel=1e-6)


def test_dpo_raises_the_margin(tiny_model_dir):
    (result,) = workers.run(1, judged_runs.preference, tiny_model_dir, "ddp", DPO, steps=20, lr=3e-3)
    before, after = result["before"], result["after"]
    assert before["held/rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert after["held/rewards/margin"] > 1.0
    assert after["held/rewards/accuracy"] == 1.0
    assert after["held/loss"] < 0.5 * before["held/loss"]


def test_the_reward_model_ranks(tiny_model_dir):
    """On data whose answers are told apart by their tokens and not by their length."""
    (result,) = workers.run(1, judged_runs.reward, tiny_model_dir, "ddp", bradley_terry, steps=20, lr=3e-3)
    assert result["after"]["held/rewards/accuracy"] == 1.0
    assert result["held/longer"] < 0.8
    mean, deviation = result["moments"]
    assert mean == pytest.approx(result["after"]["held/rewards/mean"], abs=1e-4)
    assert deviation > 0


@pytest.mark.parametrize(("size", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (2, "zero3")])
def test_the_three_references_agree(size, strategy, tiny_model_dir, tmp_path):
    """With LoRA: adapter off, a frozen copy, and columns that the policy computed before its first step."""
    ranks = workers.run(size, three_references, tiny_model_dir, strategy, tmp_path)
    for seen in ranks:
        for kind in ("frozen", "cached"):
            for one, other in zip(seen["adapter"], seen[kind], strict=True):
                torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-5)
        assert seen["moved"] > 1e-2, "the policy must have moved for this test to mean anything"


def three_references(world, model, strategy, root):
    import judged

    from framework.stages.coupling import policy_logps
    from framework.stages.preference import PairObjective, Preference

    rows = judged_runs.rows_of(0, 2 * judged_runs.STEP)
    engine = judged_runs.engine_of(world, model, strategy, adapter=True)
    batches = judged.share(rows, world.rank, world.size, judged.pairs)
    references = {
        kind: judged_runs.reference_of(kind, engine, strategy, model, root, batches)
        for kind in ("adapter", "frozen", "cached")
    }
    loader = judged.Steps(judged_runs.steps_of(rows), judged.pairs, world)
    stage = Preference(loader, PairObjective(DPO), {}, engine=engine, reference=references["cached"])
    judged_runs.train(stage, engine, range(8))
    answers = {kind: [a.tolist() for a in ask(batches)] for kind, ask in references.items()}
    now = [a.tolist() for a in policy_logps(engine, batches)]
    moved = max(
        abs(a - b)
        for one, two in zip(now, answers["adapter"], strict=True)
        for a, b in zip(one, two, strict=True)
    )
    return answers | {"moved": moved}


def test_a_moving_reference_follows_the_policy(tiny_model_dir, tmp_path):
    """A hard update after 3 steps: from then on the policy's answers of that moment are the reference's."""
    assert workers.run(2, follow, tiny_model_dir, tmp_path) == [True, True]


def follow(world, model, root):
    import judged

    from framework.stages.coupling import policy_logps
    from framework.stages.moving import Moving
    from framework.stages.preference import PairObjective, Preference

    rows = judged_runs.rows_of(0, 4 * judged_runs.STEP)
    engine = judged_runs.engine_of(world, model, "fsdp")
    reference = judged_runs.reference_of("frozen", engine, "fsdp", model, None, None)
    moving = Moving(reference.frozen, engine, every=3, mix=1.0, directory=root, keep=1)
    loader = judged.Steps(judged_runs.steps_of(rows), judged.pairs, world)
    stage = Preference(loader, PairObjective(DPO), {}, engine=engine, reference=reference, moving=moving)
    judged_runs.train(stage, engine, range(3))
    batches = judged.share(rows, world.rank, world.size, judged.pairs)
    then = policy_logps(engine, batches)
    judged_runs.train(stage, engine, range(3, 4))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(then, reference(batches), strict=True))


def test_bco_repeats_its_losses_after_a_resume(tiny_model_dir, alone):
    """A new stage after 2 of 5 steps, from the first one's state."""
    expected, _ = alone("bco")
    run = partial(judged_runs.unpaired, loss=partial(bco, beta=0.5))
    (resumed,) = workers.run(1, run.func, tiny_model_dir, "ddp", **run.keywords, stop=2)
    assert curve(resumed) == curve(expected)


def own_loss(policy, reference, weight, *, target):
    """A user's own: log(1 + exp(target - difference of log-ratios))."""
    difference = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)
    return Items(torch.nn.functional.softplus(target - difference), weight)


def test_a_loss_of_ones_own_works_by_its_names(tiny_model_dir):
    """It begins at log(1 + e)."""
    (result,) = workers.run(
        1, judged_runs.preference, tiny_model_dir, "ddp", partial(own_loss, target=1.0), steps=10, lr=3e-3
    )
    assert result["before"]["held/loss"] == pytest.approx(1.3132617, abs=1e-4)
    assert result["after"]["held/loss"] < 0.9


@pytest.mark.parametrize("size", [1, 2])
def test_rows_from_files_are_learnt_alike_packed_shared_or_padded(size, tiny_model_dir, tmp_path):
    """Pairs and rankings through the loader: a prompt held once, held twice, and padded rows.

    The reference's columns are written by the first of them and read by all.
    """
    judged_runs.write_comparisons(tmp_path / "rows.jsonl")
    ranks = workers.run(size, judged_runs.from_files, tiny_model_dir, tmp_path)
    for rank in ranks:
        shared, packed, padded = rank["losses"]
        assert packed == pytest.approx(shared, rel=1e-4)
        assert padded == pytest.approx(shared, rel=1e-4)
        assert rank["asked"] == ["shared"]


@pytest.mark.parametrize("loss", [partial(kto, beta=0.5), partial(bco, beta=0.5)], ids=["kto", "bco"])
def test_labelled_rows_from_files_are_learnt_alike_on_one_and_two_ranks(loss, tiny_model_dir, tmp_path):
    judged_runs.write_labelled(tmp_path / "rows.jsonl")
    (one,) = workers.run(1, judged_runs.labelled_from_files, tiny_model_dir, tmp_path, loss)
    two = workers.run(2, judged_runs.labelled_from_files, tiny_model_dir, tmp_path, loss)
    assert two[0] == pytest.approx(one, rel=1e-4)
    assert two[1] == two[0]
