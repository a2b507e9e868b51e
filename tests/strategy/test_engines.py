"""Every engine on every number of ranks computes what one plain process computes."""

from unittest import mock

import numpy as np
import pytest
import torch
import toy
import workers
from torch.utils._python_dispatch import TorchDispatchMode

from framework.strategy import buckets

ENGINES = [
    ("ddp", {}),
    ("fsdp", {}),
    ("fsdp", {"reshard_after_forward": False}),
]
HSDP = ("hsdp", {})  # copies of two ranks each
OFFLOAD = ("fsdp_offload", {})  # rows in the memory of the host, which here is the device, too


def trains(world, name, options, steps, count, **data):
    engine = toy.start(world, name, precision="fp32", **options, **data)
    history = toy.advance(engine, steps, count=count)
    return history, toy.portable(engine.state_dict())


def worst(joined, reference, which):
    """Largest difference over all parameters, relative to the largest entry."""
    largest = max(np.abs(values[which]).max() for values in reference.values())
    return max(np.abs(joined[name][which] - reference[name][which]).max() for name in reference) / largest


CUTS = [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (4, 2)]
CASES = [
    *((*engine, *cut) for engine in ENGINES for cut in CUTS),
    *((*HSDP, *cut) for cut in [(4, 1), (4, 3)]),
    *((*OFFLOAD, *cut) for cut in [(1, 2), (3, 2)]),
]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("name", "options", "size", "count"), CASES)
def test_loss_gradient_and_norm_equal_one_plain_process(name, options, size, count, frozen):
    """After one update exp_avg = (1 - beta) * clipped gradient, so the moments show the gradient.

    With 7 rows on 4 ranks in 2 cuts, two micro-batches are empty fills and one holds the row that
    weighs nothing. A mean over ranks or micro-batches would be off by tens of percent.
    """
    history, reference = toy.plain([0], frozen=frozen)
    results = workers.run(size, trains, name, options, [0], count, frozen=frozen)
    updates, joined = toy.whole([state for _, state in results])
    assert updates == 1
    assert joined.keys() == reference.keys()
    assert worst(joined, reference, toy.FIRST) < 1e-6
    for ours, _ in results:
        np.testing.assert_allclose(ours, history, rtol=1e-6)


def leads(world, name, options):
    """Three updates; then what a forward pass leaves, and `weights()` straight after it."""
    engine = toy.start(world, name, precision="fp32", **options)
    history = toy.advance(engine, range(3), count=2)
    with engine.inference():
        answer = engine(toy.micros(0, world.rank, world.size, 1)[0])
    assert not answer.losses.requires_grad
    assert engine._module.training
    weights = {name: (tuple(w.shape), w.flatten().tolist()) for name, w in engine.weights()}
    few = [name for name, _ in engine.weights(without="norm.")]
    assert few == [name for name in weights if not name.startswith("norm.")] != list(weights)
    return history, weights, toy.portable(engine.state_dict()), engine.trained


@pytest.mark.parametrize(("name", "options", "size"), [*((*e, 3) for e in [*ENGINES, OFFLOAD]), (*HSDP, 4)])
def test_trajectory_and_weights_after_a_forward_pass(name, options, size):
    """AdamW divides by sqrt(exp_avg_sq), which blows rounding up: losses are held to 1e-5, not 1e-6.

    `weights()` gives every parameter once, tied ones under their first name, equal to the masters
    bit for bit although the root of FSDP2 stays gathered after a forward pass.
    """
    history, reference = toy.plain(range(3))
    results = workers.run(size, leads, name, options)
    _, joined = toy.whole([state for _, _, state, _ in results])
    names = [name for name, _ in toy.Toy().named_parameters()]
    assert "head.weight" not in names
    for ours, weights, _, trained in results:
        np.testing.assert_allclose(ours, history, rtol=1e-5)
        assert list(weights) == list(trained) == names
        for name, (shape, values) in weights.items():
            assert shape == trained[name]
            assert (np.array(values, np.float32) == joined[name][toy.MASTER]).all()
    assert worst(joined, reference, toy.MASTER) < 1e-4


def spreads(world, name, options, precision, frozen):
    engine = toy.start(world, name, precision=precision, frozen=frozen, **options)
    inside = {p.dtype for _, p in engine._module.named_parameters()}
    return [(n, str(w.dtype), w.float().numpy()) for n, w in engine.weights()], sorted(map(str, inside))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("size", "name"), [(1, "ddp"), (2, "ddp"), (3, "fsdp"), (4, "hsdp"), (1, "fsdp_offload")]
)
def test_masters_are_the_source_bit_for_bit(size, name, precision, frozen):
    """The model is born without memory and filled from rank 0: trained parameters are exact fp32,

    frozen ones are kept in the dtype they compute in.
    """
    for weights, inside in workers.run(size, spreads, name, {}, precision, frozen):
        for (name_here, dtype, values), (there, value) in zip(weights, toy.source(), strict=True):
            assert name_here == there
            kept = not frozen or ".low." in there or ".high." in there
            expected = value if kept or precision == "fp32" else value.bfloat16()
            assert dtype == str(expected.dtype)
            assert (values == expected.float().numpy()).all()
        if name == "ddp":
            assert inside == [str(torch.bfloat16 if precision == "bf16" else torch.float32)]


def skips(world, name, options, precision):
    """One good step, one with a NaN on the last rank alone, one good step; and the same without."""
    history, states = [], []
    for poison in (world.size - 1, None):
        engine = toy.start(world, name, precision=precision, **options)
        toy.advance(engine, [0], count=2)
        before = toy.portable(engine.state_dict())
        if poison is not None:
            history += toy.advance(engine, [1], count=2, poison=poison)
            assert toy.same(before, toy.portable(engine.state_dict()))
        history += toy.advance(engine, [2], count=2)
        states.append(toy.portable(engine.state_dict()))
    assert toy.same(*states)
    return history


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "options", "size"), [*((*e, 2) for e in [*ENGINES, OFFLOAD]), (*HSDP, 4)])
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_anywhere(name, options, size, precision):
    """The step after a skipped one equals, bit for bit, the step of a run that never saw the NaN.

    The NaN is the last rank's, in another copy of the model than rank 0's.
    """
    for (_, skipped), after, calm in workers.run(size, skips, name, options, precision):
        assert not np.isfinite(skipped)
        assert np.isfinite(after[1])
        assert after == calm


def clips(world, name, limit):
    engine = toy.start(world, name, precision="fp32")
    norms = [norm for _, norm in toy.advance(engine, [0], count=1, max_grad_norm=limit)]
    return norms[0], toy.portable(engine.state_dict())


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_clipping_scales_the_update_and_reports_the_norm_before(name):
    """exp_avg is linear in the gradient: clipping norm n at 0.5 n halves it; exp_avg_sq is quartered."""
    free = workers.run(2, clips, name, None)
    norm = free[0][0]
    assert [n for n, _ in free] == [norm] * 2
    held = workers.run(2, clips, name, 0.5 * norm)
    assert held[0][0] == norm
    _, loose = toy.whole([state for _, state in free])
    _, tight = toy.whole([state for _, state in held])
    for name_here in loose:
        np.testing.assert_allclose(
            tight[name_here][toy.FIRST], 0.5 * loose[name_here][toy.FIRST], rtol=1e-5, atol=1e-9
        )
        np.testing.assert_allclose(
            tight[name_here][toy.SECOND], 0.25 * loose[name_here][toy.SECOND], rtol=1e-5, atol=1e-12
        )


def follows_the_rate(world, name):
    """AdamW's first update moves a parameter by lr * sign(gradient) (eps and decay aside)."""
    engine = toy.start(world, name, precision="fp32")
    for group in engine._optimizer.param_groups:
        group["lr_scale"] = 3.0 if group["weight_decay"] else 1.0
        group["weight_decay"] = 0.0
    before = {n: w.clone() for n, w in engine.weights()}
    toy.advance(engine, [0], count=1, lr=0.01, max_grad_norm=None)
    return {n: float((w - before[n]).abs().max()) for n, w in engine.weights()}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_learning_rate_times_the_scale_of_the_group(name):
    for moved in workers.run(2, follows_the_rate, name):
        assert moved["layers.0.qkv.weight"] == pytest.approx(0.03, rel=1e-3)
        assert moved["norm.bias"] == pytest.approx(0.01, rel=1e-3)
        assert moved["embed.weight"] == pytest.approx(0.01, rel=1e-3)  # among those that do not decay


def rounds(world, name, options, precision, frozen):
    """One update, then one by less than bf16 can tell; the history and both states."""
    engine = toy.start(world, name, precision=precision, frozen=frozen, **options)
    history = toy.advance(engine, [0], count=3)
    state = toy.portable(engine.state_dict())
    toy.advance(engine, [1], count=3, lr=1e-6)
    return history, state, toy.portable(engine.state_dict())


@pytest.mark.parametrize("frozen", [False, True])
def test_bf16_computes_rounded_and_adds_and_updates_in_fp32(frozen):
    """bf16 has 8 bits: its gradients differ from fp32 by about 2^-8 times a few.

    Yet both engines round the same weights and cut the same micro-batches, so summing over these and
    over ranks in fp32 makes them agree with each other to 1e-6. Updates of 1e-6 move the masters.
    """
    runs = [workers.run(2, rounds, "ddp", {}, "fp32", frozen)]
    runs += [workers.run(2, rounds, name, options, "bf16", frozen) for name, options in [*ENGINES, OFFLOAD]]
    (_, exact), *rounded = (toy.whole(state for _, state, _ in ranks) for ranks in runs)
    for ranks, (_, joined) in zip(runs[1:], rounded, strict=True):
        assert 1e-4 < worst(joined, exact, toy.FIRST) < 2e-2
        assert worst(joined, rounded[0][1], toy.FIRST) < 1e-6
        np.testing.assert_allclose(ranks[0][0], runs[0][0][0], rtol=1e-2)
        _, later = toy.whole(state for _, _, state in ranks)
        moved = [(later[n][toy.MASTER] != joined[n][toy.MASTER]).mean() for n in joined]
        assert np.mean(moved) > 0.5


class Collectives(TorchDispatchMode):
    """Counts what goes to the process group."""

    def __init__(self):
        super().__init__()
        self.gathers = self.reductions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.name().split("::")
        if namespace == "c10d":
            assert any(word in name for word in ("gather", "reduce", "alltoall")), name
            self.gathers += "gather" in name
            self.reductions += "reduce" in name or "alltoall" in name  # pieces exchanged, then summed
        return function(*args, **(kwargs or {}))


def counts(world, name, options):
    """(gathers, reductions) of each of three micro-batches."""
    engine = toy.start(world, name, precision="fp32", **options)
    found = []
    for number, batch in enumerate(toy.micros(0, world.rank, world.size, 3)):
        with Collectives() as seen, engine.micro(last=number == 2):
            engine.backward(toy.total(engine(batch), batch))
        found.append((seen.gathers, seen.reductions))
    return found


@pytest.mark.parametrize(
    ("name", "size", "options", "expected"),
    [
        # replicated: one small bucket, reduced with the last micro-batch; alone: nothing
        ("ddp", 1, {}, [(0, 0), (0, 0), (0, 0)]),
        ("ddp", 2, {}, [(0, 0), (0, 0), (0, 1)]),
        # three blocks gathered twice and the rest once; all four units reduced every time
        ("fsdp", 2, {}, [(7, 4), (7, 4), (7, 4)]),
        # gathered once a step, reduced once a step
        ("fsdp", 2, {"reshard_after_forward": False}, [(4, 0), (0, 0), (0, 4)]),
        # within a copy as fsdp, between copies nothing
        ("hsdp", 4, {}, [(7, 4), (7, 4), (7, 4)]),
    ],
)
def test_what_each_micro_batch_sends(name, size, options, expected):
    assert workers.run(size, counts, name, options) == [expected] * size


def leaves_out(world, name):
    """The norm of a step whose last micro-batch leaves block 1 out, and what the optimizer step sends."""
    engine = toy.start(world, name, precision="fp32")
    block, norms = engine._module.layers[1], []
    whole = block.forward
    for _ in range(2):  # a gradient that came too late would be in the second step
        for number, batch in enumerate(toy.micros(0, world.rank, world.size, 2)):
            block.forward = whole if number == 0 else lambda x, *, causal: x
            with engine.micro(last=number == 1):
                engine.backward(toy.total(engine(batch), batch))
        with Collectives() as seen:
            norms.append(engine.step(lr=0.0, max_grad_norm=None))
    return norms, (seen.gathers, seen.reductions)


def test_copies_add_gradients_once_a_step_also_of_a_block_that_the_last_micro_batch_leaves_out():
    """Beside the norm's one reduction, one of a bucket between copies. Results as with one copy."""
    ((expected, sent), *_), ((norms, more), *others) = (
        workers.run(4, leaves_out, name) for name in ("fsdp", "hsdp")
    )
    assert (sent, more) == ((0, 1), (0, 2))
    assert norms == pytest.approx(expected, rel=1e-6)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert all(other == (norms, more) for other in others)


def fills_many_buckets(world, unused):
    """Buckets of 50 elements, where rank 0 never touches block 1 in the last micro-batch."""
    with mock.patch.object(buckets, "BUCKET_ELEMENTS", 50):
        engine = toy.start(world, "ddp", precision="fp32")
    assert len(engine._buckets._flats) > 10
    if unused and world.rank == 0:
        engine._module.layers[1].forward = lambda x, *, causal: x
    history = toy.advance(engine, [0, 1], count=2)
    return history, toy.portable(engine.state_dict())


def test_buckets_leave_in_one_order_even_when_a_gradient_never_comes():
    """Were the order that of arrival, ranks 0 and 1 would add unlike buckets to one another."""
    (history, _), (other, _) = workers.run(2, fills_many_buckets, True)
    assert history == other
    assert np.isfinite(history).all()
    plainly, reference = toy.plain([0, 1])
    assert history[0][0] != pytest.approx(plainly[0][0], rel=1e-6)  # rank 0 computed something else
    ranks = workers.run(2, fills_many_buckets, False)
    np.testing.assert_allclose(ranks[0][0], plainly, rtol=1e-5)
    assert worst(toy.whole(state for _, state in ranks)[1], reference, toy.FIRST) < 1e-5


def misuses(world):
    engine = toy.start(world, "ddp", precision="fp32")
    batch = toy.micros(0, world.rank, world.size, 1)[0]
    with engine.micro(last=False):
        engine.backward(toy.total(engine(batch), batch))
    with pytest.raises(RuntimeError, match="without micro"):
        engine.step(lr=0.1, max_grad_norm=None)
    with engine.micro(last=True):
        engine.backward(toy.total(engine(batch), batch))
        with pytest.raises(RuntimeError, match="second backward"):
            engine.backward(toy.total(engine(batch), batch))
    engine.step(lr=0.1, max_grad_norm=None)
    assert all(parameter.grad is None for parameter in engine._module.parameters())
    return torch.distributed.is_initialized()


def test_gradients_that_would_silently_not_add_up_are_refused():
    assert workers.run(2, misuses) == [True, True]


def refuses(world, name, names):
    def weights():
        return ((n, value) for n, value in toy.source() if n in names)

    with pytest.raises(ValueError) as error:
        toy.STRATEGIES[name](world, precision="fp32").train(toy.Toy, weights, toy.adamw)
    return str(error.value)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_weights_that_do_not_fill_the_model_are_refused_on_every_rank(name):
    names = [n for n, _ in toy.source() if n != "norm.bias"]
    assert workers.run(2, refuses, name, names) == ["weights() gave no value for norm.bias"] * 2
