"""ZeRO-1, 2 and 3 against plain torch in one process: gradients, norms, skips, order, precision."""

import gc
import sys
import weakref
from functools import partial

import pytest
import torch
import workers
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from zero_worlds import (
    Pair,
    Tiny,
    adamw,
    cut,
    equal,
    loss_of,
    start,
    tiny,
    train,
    train_one_process,
    units_of,
    values_of,
    weights_of,
    whole,
)

from framework.errors import ConfigError
from framework.strategy import offload
from framework.strategy.linear import Linear
from framework.strategy.memory import Blocks
from framework.strategy.world import Group, connect
from framework.strategy.zero import Zero
from framework.strategy.zero_setup import deepspeed_config

torch.set_num_threads(1)


def make(world, stage, *, precision="fp32", seed=0, blocks=Blocks(), **options):
    if blocks.offload:
        offload.LEAST_BYTES = 0  # everything here is small
    return start(Zero(world, stage=stage, precision=precision, blocks=blocks), seed, **options)


# --- gradients -----------------------------------------------------------------------------------


def first_updates(world, stage, cuts, clip, blocks, options):
    """Of one update per cut: the norm, the losses, this rank's state."""
    answers = []
    for micros in cuts:
        engine = make(world, stage, blocks=blocks, **options)
        norms, losses = train(engine, [cut(world.size, micros)], lr=1.0, clip=clip)
        answers.append((norms[0], losses[0], engine.state_dict()))
    return answers


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"adapter": True}], ids=["tied", "untied", "lora"])
@pytest.mark.parametrize(("size", "stage"), [(2, 1), (2, 2), (2, 3), (3, 3), (4, 3)])
def test_gradients_and_update_equal_one_process(size, stage, options):
    """After one update from zero moments, exp_avg = (1 - beta1) * gradient = 0.1 * gradient."""
    reference = tiny(**options)
    norms, losses, gradients = train_one_process(reference, [cut(1, 1)], lr=1.0, clip=None)
    cuts = (1, 3) if stage == 3 and size < 4 else (2,)
    ranks = workers.run(size, first_updates, stage, cuts, None, Blocks(), options)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for number in range(len(cuts)):
        for norm, loss, _ in (rank[number] for rank in ranks):
            assert norm == pytest.approx(norms[0], rel=1e-5)
            assert loss == pytest.approx(losses[0], rel=1e-5)
        states = [rank[number][2] for rank in ranks]
        for name, moment in whole(states, "exp_avg").items():
            assert torch.allclose(moment * 10, gradients[name], rtol=1e-5, atol=1e-6 * largest), name
        for name, master in whole(states, "master").items():
            assert torch.allclose(master, reference.get_parameter(name), rtol=1e-5, atol=1e-5), name
        assert whole(states, "master").keys() == gradients.keys()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_norm_is_before_clipping_and_the_update_after(stage):
    reference = tiny()
    norms, _, gradients = train_one_process(reference, [cut(1, 1)], lr=1.0, clip=0.25)
    assert norms[0] > 1, "the case must clip"
    ranks = workers.run(2, first_updates, stage, (2,), 0.25, Blocks(), {})
    assert [rank[0][0] for rank in ranks] == pytest.approx(norms * 2, rel=1e-5)
    for name, moment in whole([rank[0][2] for rank in ranks], "exp_avg").items():
        assert torch.allclose(moment * 10, gradients[name], rtol=1e-5, atol=1e-6), name


KEEPING = [Blocks("selective"), Blocks("full"), Blocks(offload=True), Blocks("full", offload=True)]


@pytest.mark.parametrize("kept", KEEPING, ids=["selective", "full", "offload", "full-offload"])
@pytest.mark.parametrize("options", [{}, {"adapter": True}], ids=["full", "lora"])
def test_how_activations_are_kept_changes_no_gradient(kept, options):
    plain, kept = (workers.run(2, first_updates, 3, (2,), None, how, options) for how in (Blocks(), kept))
    for (left,), (right,) in zip(plain, kept, strict=True):
        assert left[:2] == right[:2]
        for name, shards in left[2].shards.items():
            for one, other in zip(shards, right[2].shards[name], strict=True):
                assert equal(one.values, other.values), name


def twenty(world, stage, options):
    engine = make(world, stage, **options)
    return train(engine, [cut(world.size, 1 + step % 3, step) for step in range(20)], lr=0.1, clip=1.0)


@pytest.mark.parametrize("options", [{}, {"adapter": True}], ids=["full", "lora"])
def test_twenty_losses_follow_one_process(options):
    plans = [cut(1, 1, step) for step in range(20)]
    norms, losses, _ = train_one_process(tiny(**options), plans, lr=0.1, clip=1.0)
    for found_norms, found_losses in workers.run(2, twenty, 3, options):
        assert found_losses == pytest.approx(losses, rel=1e-4)
        assert found_norms == pytest.approx(norms, rel=1e-3)


def forwards_first(world, stage):
    """forward, forward, backward, backward, with an evaluation in between."""
    engine = make(world, stage)
    plan = cut(world.size, 3)
    losses = []
    for micro in plan[world.rank]:
        with engine.micro(last=False):
            losses.append(loss_of(engine(micro), micro, units_of(plan)))
        with engine.inference():
            engine(micro)
    for loss in losses:
        with engine.micro(last=False):
            engine.backward(loss)
    return engine.step(lr=1.0, max_grad_norm=None)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_order_of_forwards_and_backwards_does_not_matter(stage):
    norms, _, _ = train_one_process(tiny(), [cut(1, 1)], lr=1.0, clip=None)
    assert workers.run(2, forwards_first, stage) == pytest.approx(norms * 2, rel=1e-5)


def norms_of_pairs(world, stage):
    one, two = torch.ones(1, 1), torch.ones(2, 1)
    engine = Pair.start(Zero(world, stage=stage, precision="fp32"))
    norms = []
    for step in ([two, two], [one, two], [one, one]):
        for micro in step:
            with engine.micro(last=micro is step[-1]):
                engine.backward(engine(micro).sum())
        norms.append(engine.step(lr=0.0, max_grad_norm=None))
    return norms


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_parameter_left_out_keeps_no_gradient_of_the_step_before(stage):
    """Two ranks, each x = 1: a batch of two rows adds 4 to both gradients, one of one row 2 to a alone.

    [two, two]: a = b = 8, norm sqrt(128); [one, two]: a = 6, b = 4, sqrt(52); [one, one]: a = 4, b = 0.
    """
    for norms in workers.run(2, norms_of_pairs, stage):
        assert norms == pytest.approx([128**0.5, 52**0.5, 4.0])


# --- skips ---------------------------------------------------------------------------------------


def skip(world, stage, precision, clip):
    """(norm of the skipped step, nothing changed, norm after it, norm of an engine that never skipped)"""
    plans = [cut(world.size, 2, step) for step in range(3)]
    engine, calm = make(world, stage, precision=precision), make(world, stage, precision=precision)
    train(engine, plans[:1], lr=0.1, clip=clip)
    train(calm, plans[:1], lr=0.1, clip=clip)
    before = engine.state_dict()
    norms = []
    for poison in (float("nan"), float("inf")):
        for number, micro in enumerate(plans[1][world.rank]):
            with engine.micro(last=number == 1):
                loss = loss_of(engine(micro), micro, units_of(plans[1]))
                engine.backward(loss * (poison if (world.rank, number) == (world.size - 1, 0) else 1.0))
        norms.append(engine.step(lr=0.1, max_grad_norm=clip))
    after = engine.state_dict()
    same = before.updates == after.updates == 1 and all(
        equal(left.values, right.values)
        for name in engine.trained
        for left, right in zip(before.shards[name], after.shards[name], strict=True)
    )
    weights = equal(weights_of(engine), weights_of(calm))
    with engine.inference(), calm.inference():
        micro = plans[1][world.rank][0]
        weights = weights and torch.equal(engine(micro).logps, calm(micro).logps)
    train(engine, plans[2:], lr=0.1, clip=clip)
    train(calm, plans[2:], lr=0.1, clip=clip)
    continued = equal(weights_of(engine), weights_of(calm))
    return norms, same, weights, continued, engine.state_dict().updates


@pytest.mark.parametrize(
    ("size", "stage", "clip", "precision"),
    [(2, 1, 1.0, "bf16"), (2, 2, None, "fp32"), (2, 3, 1.0, "bf16"), (3, 3, None, "fp32")],
)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing(size, stage, clip, precision):
    for norms, same, weights, continued, updates in workers.run(size, skip, stage, precision, clip):
        assert not any(torch.isfinite(torch.tensor(norms)))
        assert same
        assert weights
        assert continued
        assert updates == 2


# --- weights and precision -----------------------------------------------------------------------


def spread(world, stage, precision, options):
    """(everything `weights()` gave, whether the numbers a forward uses are the rounded reference)"""
    engine = make(world, stage, precision=precision, **options)
    found = [(name, value.clone()) for name, value in engine.weights()]
    reference = tiny(**options).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    reference.phase = Tiny().phase
    micro = cut(1, 3)[0][0]
    with engine.inference(), torch.no_grad():
        alike = torch.equal(engine(micro).logps, reference(micro).logps)
    return found, alike, engine.trained


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"adapter": True}], ids=["tied", "untied", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("size", "stage"), [(2, 1), (2, 2), (3, 3)])
def test_masters_are_exact_and_compute_weights_are_rounded_masters(size, stage, precision, options):
    reference = tiny(**options)
    for found, alike, trained in workers.run(size, spread, stage, precision, options):
        assert [name for name, _ in found] == [name for name, _ in reference.named_parameters()]
        for name, value in found:
            expected = reference.get_parameter(name).detach()
            if not expected.requires_grad and name not in trained and precision == "bf16":
                expected = expected.bfloat16()
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected), name
        assert alike
        assert trained == {n: tuple(p.shape) for n, p in reference.named_parameters() if p.requires_grad}


def refuses_weights(world, names, called_on):
    def weights():
        called_on.append(world.rank)
        return ((name, torch.zeros(1, 1)) for name in names)

    with pytest.raises(ValueError, match=r"b\.weight"):
        Zero(world, precision="fp32").train(Pair, weights, adamw)
    return called_on


def test_weights_are_read_on_rank_0_only_and_missing_ones_are_named():
    assert workers.run(2, refuses_weights, ["a.weight"], []) == [[0], []]


def evaluated(world, stage):
    engine = make(world, stage, dropout=0.5)
    micro = cut(1, 3)[0][0]
    with engine.inference():
        first, again = engine(micro).logps, engine(micro).logps
    trained = engine(micro).logps
    with torch.no_grad():
        expected = tiny()(micro).logps
    return (
        torch.allclose(first, expected, atol=1e-6) and torch.equal(first, again) and not first.requires_grad,
        trained.requires_grad and not torch.allclose(trained, expected, atol=1e-3),
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_inference_has_no_dropout_and_no_gradients(stage):
    assert workers.run(2, evaluated, stage) == [(True, True)] * 2


# --- life in a process ---------------------------------------------------------------------------


def linears(world, stage):
    """Whose `linear` is called: outside, inside a micro-batch, after one that raised."""
    engine = make(world, stage)
    before = nn.functional.linear
    with engine.micro(last=False):
        inside = nn.functional.linear
    with pytest.raises(KeyError), engine.micro(last=False):
        raise KeyError
    return inside is before, nn.functional.linear is before


def test_torch_keeps_its_linear_outside_of_micro_batches():
    """Inside, ZeRO-3 has its own: torch's keeps every gathered weight alive until the backward pass."""
    assert workers.run(2, linears, 3) == [(False, True)] * 2
    assert workers.run(2, linears, 2) == [(True, True)] * 2


def keeps_products(context, operation, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if "mm" in operation.name() else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    ("shape", "kept"), [((5,), False), ((4, 5), False), ((2, 3, 5), False), ((4, 5), True), ((2, 3, 5), True)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_linear_of_micro_batches_has_the_gradients_of_torchs(shape, bias, frozen, kept):
    """Also where a checkpointed region keeps the results of products, which must not change after."""
    answers = []
    for linear in (nn.functional.linear, partial(Linear.apply, nn.functional.linear)):
        torch.manual_seed(0)
        x, weight, offset = torch.randn(shape), torch.randn(3, 5), torch.randn(3)
        leaves = [x.requires_grad_(), weight.requires_grad_(not frozen), offset.requires_grad_()]

        def twice(x, weight, offset, linear=linear):
            return linear(linear(x, weight, offset if bias else None).tanh(), weight.t()).tanh()

        contexts = partial(create_selective_checkpoint_contexts, keeps_products)
        y = checkpoint(twice, *leaves, use_reentrant=False, context_fn=contexts) if kept else twice(*leaves)
        y.pow(2).sum().backward()
        answers.append([y.detach()] + [leaf.grad for leaf in leaves])
    for torchs, ours in zip(*answers, strict=True):
        assert (torchs is None) == (ours is None)
        assert torchs is None or torch.allclose(torchs, ours, rtol=1e-6, atol=1e-6)


def models_alive(world, stage):
    models = []
    for _ in range(2):
        engine = make(world, stage)
        train(engine, [cut(world.size, 2)], lr=0.1, clip=None)
        models.append(weakref.ref(engine._engine.module))
        del engine
        gc.collect()
    return [model() is not None for model in models]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_let_go_takes_its_model_with_it(stage):
    assert workers.run(2, models_alive, stage) == [[False, False]] * 2


def two_engines(world, stages):
    """Interleaved micro by micro: (norms of the first, norms of the second)"""
    engines = [make(world, stage, seed=stage) for stage in stages]
    plan = cut(world.size, 2)
    for micro in plan[world.rank]:
        for engine in engines:
            with engine.micro(last=False):
                engine.backward(loss_of(engine(micro), micro, units_of(plan)))
    return [engine.step(lr=0.1, max_grad_norm=None) for engine in engines]


def test_two_engines_do_not_disturb_each_other():
    expected = [train_one_process(tiny(seed), [cut(1, 1)], lr=0.1, clip=None)[0][0] for seed in (3, 2)]
    for norms in workers.run(2, two_engines, (3, 2)):
        assert norms == pytest.approx(expected, rel=1e-5)


def test_a_missing_package_is_a_refusal_that_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    world = Group(0, 2, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match="pip install"):
        Zero(world).train(Tiny, values_of(tiny()), adamw)


def test_a_world_of_one_needs_no_deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    world = connect("cpu", timeout_s=1, environment={})
    engine = Zero(world, precision="fp32").train(Tiny, values_of(tiny()), adamw)
    norms, _ = train(engine, [cut(1, 2)], lr=1.0, clip=None)
    assert norms == pytest.approx(train_one_process(tiny(), [cut(1, 1)], lr=1.0, clip=None)[0])


def test_the_configuration_sums_in_fp32_and_knows_no_batch():
    for stage in (1, 2, 3):
        plain, half = (deepspeed_config(stage=stage, precision=precision) for precision in ("fp32", "bf16"))
        assert "bf16" not in plain
        assert half["bf16"] == {"enabled": True}
        assert half["data_types"]["grad_accum_dtype"] == half["communication_data_type"] == "fp32"
        assert half["zero_optimization"]["stage"] == stage
        assert half["managed_gradient_accumulation"] is False
