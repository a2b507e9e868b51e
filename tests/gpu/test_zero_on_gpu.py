"""ZeRO-3 with its state off the GPU, and ZeRO++ with rounded traffic: what only CUDA devices can show."""

import tempfile
from pathlib import Path

import pytest
import torch

from framework.cluster.crew import Crew
from framework.config import cells, certify, measured, specimens
from framework.config.cells import Cell

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        specimens.write(where, specimens.write_model(where / "model", tied=True))
        yield where


def line(place, cell, *more):
    return [*cells.line(cell, place, place / "model", device="cuda"), *more]


def run(size, arguments):
    crew = Crew(size, device="cuda")
    try:
        return crew.run(measured.measure, arguments, steps=cells.STEPS, timeout_s=300)
    finally:
        crew.kill()


@pytest.fixture(scope="module")
def alone(place):
    (found,) = run(1, line(place, Cell("sft", "ddp", "full", True, True, 1)))
    return found


@pytest.mark.parametrize("parameters", ["none", "cpu"])
def test_state_in_the_memory_of_the_host_trains_the_same(parameters, place, alone):
    cell = Cell("sft", "zero3_offload", "full", True, True, 1)
    (found,) = run(1, line(place, cell, f"strategy.parameters={parameters}"))
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert certify.apart(found["weights"], alone["weights"]) < 1e-5


def test_state_on_nvme_trains_the_same(place, alone, tmp_path):
    """60,000 parameters are too few for files; that files can be opened is asked all the same."""
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio and its headers are not here")
    cell = Cell("sft", "zero3_offload", "full", True, True, 1)
    nvme = ["strategy.optimizer=nvme", "strategy.parameters=none", f"strategy.nvme_path={tmp_path}"]
    (found,) = run(1, line(place, cell, *nvme))
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def rounded(world, arguments, hosts):
    """A run whose devices DeepSpeed takes for `hosts` hosts of as many devices each."""
    from unittest import mock

    from deepspeed.accelerator import get_accelerator

    devices = world.size // hosts
    with mock.patch.object(type(get_accelerator()), "device_count", return_value=devices):
        return measured.measure(world, arguments, steps=cells.STEPS)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    ("weights", "gradients", "bound"),
    [("true", "false", 0.05), ("false", "true", 0.15), ("true", "true", 0.2)],
)
def test_rounded_traffic_stays_near(weights, gradients, bound, place, alone):
    """8 bits of weights, 4 of gradients between two hosts of one device; 0 would mean no rounding."""
    cell = Cell("sft", "zeropp", "full", True, True, 2, "bf16")
    options = [f"strategy.quantized_weights={weights}", f"strategy.quantized_gradients={gradients}"]
    crew = Crew(2, device="cuda")
    try:
        ranks = crew.run(rounded, line(place, cell, *options), 2, timeout_s=300)
    finally:
        crew.kill()
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=bound)
    assert 0 < certify.apart(measured.whole(ranks), measured.whole([alone])) < 3 * bound
