"""ZeRO-3 that offloads and ZeRO++ that keeps a second copy compute what ZeRO-3 computes."""

import pytest
import torch
import workers
from torch import nn
from zero_worlds import (
    Pair,
    Tiny,
    adamw,
    cut,
    equal,
    reader,
    settle,
    start,
    tiny,
    train,
    train_one_process,
    weights_of,
    whole,
)

from framework.errors import ConfigError
from framework.strategy.base import FIRST, MASTER, SECOND
from framework.strategy.world import Group
from framework.strategy.zero import Offload, PlusPlus, Zero
from framework.strategy.zero_options import _one_rank_a_device
from framework.strategy.zero_setup import deepspeed_config

COPIES = PlusPlus(shards=2, quantized_weights=False, quantized_gradients=False)
ON_HOST = Offload(), Offload(parameters="cpu")
CASES = [
    (1, ON_HOST[1], {}, "fp32"),
    (2, ON_HOST[0], {}, "fp32"),
    (3, ON_HOST[1], {"adapter": True}, "fp32"),
    (2, ON_HOST[1], {}, "bf16"),
    (4, COPIES, {}, "fp32"),
    (4, COPIES, {"adapter": True}, "bf16"),
]


def make(world, choice, precision, options, seed=0):
    return start(Zero(world, precision=precision, options=choice), seed, **options)


def trains(world, choice, precision, options):
    """Five steps, stopped after three and gone on with by an engine that had begun elsewhere.

    (norms, losses, state after three, state of the second engine then, weights of both at the end)
    """
    plans = [cut(world.size, 1 + step % 3, step) for step in range(5)]
    engine = make(world, choice, precision, options)
    norms, losses = train(engine, plans[:3], lr=0.1, clip=1.0)
    state = engine.state_dict()
    rest = train(engine, plans[3:], lr=0.1, clip=1.0)
    other = make(world, choice, precision, options, seed=0 if options else 7)
    train(other, plans[:1], lr=0.5, clip=None)
    with torch.no_grad():
        other(plans[0][world.rank][0])  # leaves weights gathered, and second copies of them
    other.load_state_dict(state.updates, reader(_all(world, state)))
    loaded = other.state_dict()
    train(other, plans[3:], lr=0.1, clip=1.0)
    return norms + rest[0], losses + rest[1], state, loaded, weights_of(engine), weights_of(other)


def _all(world, state):
    """All ranks' states on every rank."""
    from framework.strategy.base import EngineState, Shard

    mine = {
        name: [(s.shape, s.start, {w: v.tolist() for w, v in s.values.items()}) for s in shards]
        for name, shards in state.shards.items()
    }
    return [
        EngineState(
            state.updates,
            {
                name: [
                    Shard(tuple(s), start, {w: torch.tensor(v) for w, v in values.items()})
                    for s, start, values in shards
                ]
                for name, shards in rank.items()
            },
        )
        for rank in world.gather(mine)
    ]


@pytest.mark.parametrize(("size", "choice", "options", "precision"), CASES)
def test_training_and_state_are_those_of_one_process(size, choice, options, precision):
    """Losses and norms of plain torch; masters, moments and what follows from them kept to the bit."""
    expected = train_one_process(tiny(**options), [cut(1, 1, step) for step in range(5)], lr=0.1, clip=1.0)
    close = {"rel": 1e-6} if precision == "fp32" else {"rel": 1e-2}
    ranks = workers.run(size, trains, choice, precision, options, timeout_s=180)
    for norms, losses, _, _, end, other_end in ranks:
        assert losses == pytest.approx(expected[1], **close)
        assert norms == pytest.approx(expected[0], **close)
        assert equal(end, other_end)
    saved, loaded = ([rank[which] for rank in ranks] for which in (2, 3))
    assert {state.updates for state in saved + loaded} == {3}
    for which in (MASTER, FIRST, SECOND):
        assert equal(whole(saved, which), whole(loaded, which))


def second_copies(world):
    """How many parameters have one after a forward pass: with copies of two ranks, and without, in turn."""
    found = []
    for choice in (COPIES, None, COPIES):
        engine = make(world, choice, "fp32", {})
        engine(cut(world.size, 1)[world.rank][0])
        held = [getattr(p, "ds_secondary_tensor", None) for p in engine._engine.module.parameters()]
        found.append(sum(copy is not None for copy in held))
    return found, len(held)


def test_a_second_copy_is_kept_where_it_was_asked_for():
    for (with_copies, without, again), parameters in workers.run(4, second_copies, timeout_s=180):
        assert with_copies == again > parameters // 2
        assert without == 0


def pairs(world, poison):
    """After a step of both and one of `a` alone whose loss is times `poison`: norms and b's master."""
    one, two = torch.ones(1, 1), torch.ones(2, 1)
    engine = Pair.start(Zero(world, precision="fp32", options=Offload()))
    answers = []
    for x, factor in ((two, 1.0), (one, poison), (one, 1.0)):
        with engine.micro(last=True):
            engine.backward(engine(x).sum() * factor)
        norm = engine.step(lr=0.0, max_grad_norm=None)
        answers.append((norm, engine.state_dict().shards["b.weight"]))
    return [(norm, [shard.values[FIRST].item() for shard in shards]) for norm, shards in answers]


def test_offloaded_gradients_of_a_step_before_are_not_used_again():
    """Two ranks, x = 1: two rows add 4 to both gradients, norm sqrt(32); one row adds 2 to `a` alone, 2.

    b's first moment is (1 - 0.9) * 4, then 0.9 times that with a gradient of zero.
    """
    for first, second, _ in workers.run(2, pairs, 1.0):
        assert (first[0], second[0]) == pytest.approx((32**0.5, 2.0))
        if first[1]:
            assert (first[1][0], second[1][0]) == pytest.approx((0.4, 0.36))


def test_an_offloaded_step_that_is_not_finite_changes_nothing():
    for first, second, third in workers.run(2, pairs, float("nan")):
        assert not torch.isfinite(torch.tensor(second[0]))
        assert third[0] == pytest.approx(2.0)
        if first[1]:
            assert second[1] == first[1]
            assert third[1][0] == pytest.approx(0.36)


# --- what reaches DeepSpeed, and what a machine cannot do -------------------------------------------


def test_options_reach_deepspeed_under_its_own_names(monkeypatch, tmp_path):
    world = Group(0, 4, 0, torch.device("cuda", 0))
    monkeypatch.setattr(Offload, "_usable", lambda self: self.directory)
    module = nn.Linear(10, 7)
    offload = Offload("nvme", "nvme", tmp_path, pinned=True).sections(module, world, train=True)
    place = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": True}
    assert offload["offload_optimizer"] == place
    assert offload["offload_param"] == {**place, "buffer_size": 18}  # 70 numbers over 4 ranks
    zero = deepspeed_config(stage=3, precision="bf16", options=offload)["zero_optimization"]
    assert zero["offload_param"] == offload["offload_param"]
    plus = PlusPlus(2, quantized_weights=False, quantized_gradients=True)
    monkeypatch.setattr("framework.strategy.zero_options._one_rank_a_device", lambda world: None)
    config = deepspeed_config(stage=3, precision="bf16", options=plus.sections(module, world, train=True))
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 2
    assert config["zero_optimization"]["zero_quantized_gradients"] is True
    assert config["communication_data_type"] == "fp16", "the kernel takes any bits for fp16"


def test_numbers_that_the_kernel_cannot_take_are_refused_by_name():
    world = Group(0, 4, 0, torch.device("cuda", 0))
    with pytest.raises(
        ConfigError, match=r"bias leaves 2 numbers on each of 4 ranks.*quantized_weights=false"
    ):
        PlusPlus(2, quantized_gradients=False).sections(nn.Linear(32, 7), world, train=True)


def fewer_ranks_than_devices(world, devices):
    """As rank 0 of two hosts of one rank each."""
    world.local_rank = 0
    try:
        _one_rank_a_device(world, visible=lambda: devices)
    except ConfigError as error:
        return str(error)
    return None


def test_quantised_gradients_want_a_rank_on_every_device():
    assert workers.run(2, fewer_ranks_than_devices, 1) == [None, None]
    assert all("launch.nproc=8" in told for told in workers.run(2, fewer_ranks_than_devices, 8))


def without_libaio(world, directory):
    from unittest import mock

    settle()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def weights():
        raise AssertionError("a weight was read")

    with (
        mock.patch.object(AsyncIOBuilder, "is_compatible", return_value=False),
        pytest.raises(ConfigError) as told,
    ):
        Zero(world, options=Offload("nvme", directory=directory)).train(Tiny, weights, adamw)
    return str(told.value)


def test_nvme_without_libaio_is_refused_before_a_weight_is_read(tmp_path):
    for told in workers.run(2, without_libaio, tmp_path / "swap"):
        assert "libaio" in told
        assert "strategy.optimizer=cpu" in told
