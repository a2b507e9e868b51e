"""What crosses the wire: the losses of one host, and the bytes that `strategy.wire` says, within 3 %.

Letters: w hosts of one rank, m micro-batches a step, 4 bytes a number (fp32).
"""

import math
from functools import partial

import pytest
from hosts import Hosts, Ranks

from framework.strategy import wire

pytestmark = pytest.mark.multihost
STEPS = 4


@pytest.fixture(scope="module")
def ranks():
    """ranks(w): one rank on each of w hosts, made when first asked for."""
    made = {}

    def get(size):
        if size not in made:
            made[size] = Ranks(Hosts(size))
        return made[size]

    yield get
    for one in made.values():
        one.hosts.close()


@pytest.fixture(scope="module")
def alone(ranks, settings):
    """What one host computes, by adapter and by whether the step is cut."""
    made = {}

    def get(**changes):
        key = tuple(sorted(changes.items()))
        if key not in made:
            (made[key],) = ranks(1).run(settings(**changes), steps=STEPS)
        return made[key]

    return get


def load(every, trained):
    """What there is to send: blocks are gathered one by one, the rest with the whole."""
    blocks = sum(math.prod(shape) for name, shape in every.items() if ".layers." in name)
    whole, updated = (sum(map(math.prod, sizes.values())) for sizes in (every, trained))
    return wire.Load(blocks, whole - blocks, updated, weight_bytes=4)


CASES = {
    "ddp": (wire.ddp, {"strategy": "ddp"}),
    "fsdp": (wire.fsdp, {"strategy": "fsdp"}),
    "fsdp, weights kept": (wire.fsdp_kept, {"strategy": "fsdp", "strategy__reshard_after_forward": "false"}),
    "hsdp": (
        partial(wire.hsdp, shards=2),
        {"strategy": "hsdp", "strategy__shard_size": 2, "launch__nproc": 4},
    ),
    "zero3": (partial(wire.zero3, gloo=True), {"strategy": "zero3"}),
}


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("tokens", [1024, 128], ids=["one micro-batch", "accumulation"])
@pytest.mark.parametrize("w", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_losses_of_one_host_and_bytes_of_the_formula(
    case, w, tokens, adapter, ranks, alone, settings, record_property
):
    formula, changes = CASES[case]
    if case == "hsdp" and w == 2:
        pytest.skip("one copy on two hosts is fsdp")
    common = {"adapter": adapter, "batch__tokens_per_micro": tokens}
    one = alone(strategy="ddp", **common)
    answers = ranks(w).run(settings(**common, **changes), steps=STEPS)
    for answer in answers:
        assert answer["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(one["norms"], rel=1e-4)
    micros = answers[0]["micros"]
    m = sum(micros[1:]) / (STEPS - 1)
    assert m > 1 if tokens == 128 else m == 1
    every = alone(strategy="ddp", adapter="full", batch__tokens_per_micro=tokens)["trained"]
    if adapter == "lora":
        every = every | one["trained"]
    expected = formula(w, m, load(every, one["trained"]))
    for host, answer in enumerate(answers):
        ratio = answer["sent_per_step"] / expected
        record_property(f"host {host}", round(ratio, 4))
        assert ratio == pytest.approx(1, abs=0.03), (
            f"host {host} sent {ratio:.3f} of {expected:.0f} bytes a step"
        )


def test_a_slow_link_takes_time_and_changes_nothing(ranks, settings):
    """20 Mbit/s out of one of two hosts: the same bits, no sooner than its bytes can pass."""
    both, told = ranks(2), settings(strategy="fsdp")
    fast = both.run(told, steps=STEPS)
    both.hosts.slow(1, 20)
    try:
        slow = both.run(told, steps=STEPS)
    finally:
        both.hosts.slow(1, None)
    assert [answer["losses"] for answer in slow] == [answer["losses"] for answer in fast]
    assert [answer["norms"] for answer in slow] == [answer["norms"] for answer in fast]
    least = slow[1]["sent_per_step"] * (STEPS - 1) * 8 / 20e6
    assert slow[0]["seconds"] > 0.9 * least
    assert slow[0]["seconds"] > 2 * fast[0]["seconds"]
