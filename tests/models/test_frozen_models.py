"""Reference and reward models on every strategy: right answers, nothing held besides weights, refilled."""

import gc
import time
from functools import partial

import pytest
import spread
import torch
import workers
from rows import batch, segments

from framework.train.optim import adamw

SIZES = {"fp32": 4, "bf16": 2}


def held():
    """Bytes of every tensor's memory in this process, by where it lies."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes(), thing.dtype
    return found


def new_since(before):
    """What is held besides, a moment later: threads of collectives let go of their buffers when they run."""
    time.sleep(0.02)
    return {place: what for place, what in held().items() if place not in before}


def freezes(world, name, precision, head, path):
    """(answers, the same by one plain module, bytes held per parameter, types held, whether any grows)."""
    build, weights = spread.model(path, head=head)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    plain = build().eval().requires_grad_(False)
    for parameter, (_, tensor) in zip(plain.parameters(), weights(), strict=True):
        parameter.data = tensor.detach().to(dtype)
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    rows = batch(segments([5, 20, 7 + world.rank], 400, seed=world.rank))
    expected = plain(rows)[0]
    before = held()
    frozen = spread.STRATEGIES[name](world, precision=precision).freeze(build, weights)
    answers = [frozen(rows)[0] for _ in range(3)]
    assert all(torch.equal(answer, answers[0]) and not answer.requires_grad for answer in answers)
    grown = min((new_since(before) for _ in range(5)), key=lambda new: sum(size for size, _ in new.values()))
    large = {str(kind) for size, kind in grown.values() if size > 256}
    return torch.equal(answers[0], expected), sum(size for size, _ in grown.values()) / parameters, large


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "size"), [("ddp", 1), ("zero3", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2)])
def test_a_frozen_model_holds_its_weights_and_nothing_else(name, size, precision, tiny_model_dir):
    """Bytes per parameter on each rank, after forward passes: 2 in bf16, 4 in fp32; half of it where two
    ranks share. Ten percent are for rotary tables, uneven rows and the answers themselves."""
    expected = SIZES[precision] / (size if name != "ddp" else 1)
    for head in ("lm", "score"):
        for right, bytes_each, kinds in workers.run(size, freezes, name, precision, head, tiny_model_dir):
            assert right
            assert expected <= bytes_each < 1.1 * expected
            assert kinds <= {str(torch.bfloat16 if precision == "bf16" else torch.float32)}


def refills(world, name, precision, path):
    """A trained model and its reference: unlike after a step, alike after a refill, then unlike again."""
    build, weights = spread.model(path)
    strategy = spread.STRATEGIES[name](world, precision=precision)
    engine = strategy.train(build, weights, partial(adamw, **spread.OPTIMIZER))
    frozen = strategy.freeze(build, weights)
    rows = batch(segments([5, 20, 7 + world.rank], 400, seed=world.rank))
    alike = []

    def ask():
        with engine.inference():
            alike.append(torch.equal(engine(rows).logps, frozen(rows).logps))

    ask()
    for number in range(2):
        spread.step(engine, number, needs=(frozenset(), frozenset()), lr=1e-2)
        ask()
        frozen.refill(engine.weights())
        ask()
    return alike


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
def test_a_reference_is_refilled_from_the_trained_weights(name, precision, tiny_model_dir):
    expected = [True, False, True, False, True]
    assert workers.run(2, refills, name, precision, tiny_model_dir) == [expected] * 2


def misfills(world, name, path):
    build, weights = spread.model(path)
    frozen = spread.STRATEGIES[name](world, precision="bf16").freeze(build, weights)
    given = list(weights())
    with pytest.raises(ValueError, match=r"no value for lm\.model\.norm\.weight"):
        frozen.refill(given[:-1])
    with pytest.raises(ValueError, match="came twice"):
        frozen.refill([*given, given[0]])


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_a_refill_that_is_not_whole_is_refused(name, tiny_model_dir):
    workers.run(2, misfills, name, tiny_model_dir)
