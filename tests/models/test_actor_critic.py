"""One module for policy and critic, on every strategy: what is left out gets nothing and disturbs nothing."""

import dataclasses

import pytest
import spread
import torch
import workers
from rows import batch, segments

from framework.errors import ModelError
from framework.models import actor_critic, export, load
from framework.strategy.base import FIRST

STRATEGIES = ["ddp", "fsdp", "fsdp-kept", "zero3"]


@torch.no_grad()
def test_both_answer_as_each_would_alone(tiny_model_dir):
    alone = [filled(*spread.model(tiny_model_dir, head=head)) for head in ("lm", "score")]
    together = filled(*spread.both(tiny_model_dir))
    rows = batch(segments((7, 3, 12), 400))
    logps, values = alone[0](rows).logps, alone[1](rows).scores
    outputs = together(rows, needs=frozenset({"values", "entropies"}))
    assert torch.equal(outputs.logps, logps)
    assert torch.equal(outputs.values, values)
    assert outputs.entropies is not None
    assert together(rows).values is None
    assert torch.equal(together(rows, actor=False).scores, values)
    assert len(together.blocks()) == 6
    cooled = together(rows, needs=spread.VALUES, temperature=0.5)
    assert torch.equal(cooled.values, values)
    assert not torch.allclose(cooled.logps, logps, atol=1e-2)


def filled(build, weights):
    module = build().eval()
    parameters = dict(module.named_parameters())
    given = dict(weights())
    assert list(given) == list(parameters)
    for name, tensor in given.items():
        parameters[name].copy_(tensor)
    return module


def test_a_part_is_under_its_own_names_and_both_are_exported(tiny_model_dir, tmp_path):
    """What an engine yields goes to the disk as two models that are read again as they were."""
    _, weights = spread.both(tiny_model_dir)
    for head, prefix in (("lm", actor_critic.POLICY), ("score", actor_critic.CRITIC)):
        description = load.inspect(str(tiny_model_dir), head=head)
        mine = actor_critic.part(weights(), prefix)
        export.export(tmp_path / head, description=description, weights=mine)
        again = load.reader(load.inspect(str(tmp_path / head), head=head))
        expected = dict(actor_critic.part(weights(), prefix))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again())
    names = [name for name, _ in weights()]
    assert names[0] == "policy.lm.model.embed_tokens.weight"
    assert names[-1] == "critic.lm.score.weight"


def test_a_critic_that_reads_other_tokens_is_refused(tiny_model_dir):
    actor = load.inspect(str(tiny_model_dir))
    critic = load.inspect(str(tiny_model_dir), head="score")
    actor_critic.check(actor, critic)
    words = load.inspect(str(tiny_model_dir)).tokenizer
    words.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=r"the critic .* has another vocabulary than the model"):
        actor_critic.check(actor, dataclasses.replace(critic, tokenizer=words))


# --- engines -------------------------------------------------------------------------------------


POLICY_ONLY = frozenset()
CUTS = [  # what the first and the second micro-batch of each rank ask for, step by step
    (POLICY_ONLY, POLICY_ONLY),
    (spread.VALUES, spread.VALUES),
    (spread.VALUES, POLICY_ONLY),
    (POLICY_ONLY, spread.VALUES),
    (None, None),  # the critic alone
    (POLICY_ONLY, None),
]


def gradients(world, name, path, adapter):
    """Of steps without a learning rate: norms, and this rank's first moments after each."""
    engine = spread.engine(world, name, path, adapter=adapter)
    norms, moments = [], []
    for number, needs in enumerate(CUTS):
        norms.append(spread.step(engine, number, needs=needs, lr=0.0))
        shards = engine.state_dict().shards
        moments.append({n: [(each.start, each.values[FIRST]) for each in shards[n]] for n in shards})
    return norms, moments, engine.trained


def whole(ranks, step):
    """First moments by name, flat, from all ranks' slices."""
    flat = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in ranks[0][2].items()}
    for _, moments, _ in ranks:
        for name, pieces in moments[step].items():
            for start, values in pieces:
                flat[name][start : start + len(values)] = values
    return flat


@pytest.mark.parametrize("adapter", [None, spread.LORA | {"dropout": 0.0}], ids=["full", "lora"])
def test_gradients_on_two_ranks_equal_one_process(adapter, tiny_model_dir):
    """Also where micro-batches, or all of them, leave the critic out: then its gradient is exactly zero."""
    reference = workers.run(1, gradients, "ddp", tiny_model_dir, adapter)
    for name in STRATEGIES:
        ranks = workers.run(2, gradients, name, tiny_model_dir, adapter)
        assert (adapter is None) == ("critic.lm.model.embed_tokens.weight" in ranks[0][2])
        for step in range(len(CUTS)):
            assert [rank[0][step] for rank in ranks] == pytest.approx([reference[0][0][step]] * 2, rel=1e-5)
            expected, found = whole(reference, step), whole(ranks, step)
            largest = max(float(moment.abs().max()) for moment in expected.values())
            for parameter, moment in expected.items():
                assert torch.allclose(found[parameter], moment, rtol=1e-4, atol=1e-6 * largest), parameter
                assert moment.any() or step == 0 or ".lora_A." in parameter
                assert not parameter.startswith("critic.") or step > 0 or not found[parameter].any()


def rates(world, name, path):
    """Largest move of policy and critic in one step."""
    engine = spread.engine(world, name, path, scale=3.0)
    before = spread.copied(engine.weights())
    spread.step(engine, 0, lr=0.01)
    moved = {name: float((w - before[name]).abs().max()) for name, w in engine.weights()}
    return [max(d for name, d in moved.items() if name.startswith(p)) for p in ("policy.", "critic.")]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
def test_the_critic_has_a_rate_of_its_own(name, tiny_model_dir):
    """AdamW's first update moves a weight by lr: 0.01, and three times that."""
    for moved in workers.run(2, rates, name, tiny_model_dir):
        assert moved == pytest.approx([0.01, 0.03], rel=1e-2)


def interleaved(world, name, path, precision, ask):
    """Three steps; with `ask`, forward passes of all kinds before, between and after them."""
    adapter = spread.LORA
    engine = spread.engine(world, name, path, precision=precision, adapter=adapter)
    frozen = spread.STRATEGIES[name](world, precision=precision).freeze(*spread.model(path)) if ask else None
    norms = []
    for number in range(3):
        if ask and number != 1:  # what a forward pass leaves behind may outlive the next step
            with engine.inference():
                for batch in spread.shares(world, number, micros=3):
                    off = engine(batch, adapter=False).logps  # before anything else saw the adapters
                    first = engine(batch).logps
                    engine(batch, needs=spread.VALUES)
                    engine(batch, actor=False)
                    assert torch.equal(engine(batch).logps, first)
                    assert not first.requires_grad
                assert frozen is not None
                assert torch.equal(frozen(batch).logps, off), "the reference is the start model"
            with engine.inference():
                engine(batch, actor=False)
        norms.append(spread.step(engine, number))
    return norms, spread.copied(engine.weights())


def compared(world, *arguments):
    """(the two runs are equal to the bit, the first norm of gradients)"""
    (norms, weights), (again, others) = (interleaved(world, *arguments, ask) for ask in (False, True))
    return norms == again and all(torch.equal(weights[name], others[name]) for name in weights), norms[0]


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "bf16") for name in STRATEGIES), ("ddp", "fp32"), ("zero3", "fp32")]
)
def test_asking_between_steps_changes_no_bit_of_training(name, precision, tiny_model_dir):
    """Policy, critic, adapters off, frozen reference; with dropout, whose draws must not shift either."""
    for same, norm in workers.run(2, compared, name, tiny_model_dir, precision):
        assert same
        assert norm > 0
