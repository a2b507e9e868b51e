"""ZeRO-3 with masters, moments and weights in files (ZeRO-Infinity), which DeepSpeed reads and writes.

Needs libaio and its headers (`apt install libaio-dev`); the first use compiles for some minutes.
"""

import os

import pytest

from framework.cluster.crew import Crew
from framework.config import cells, certify, measured, specimens
from framework.config.cells import Cell

STEPS = 4
MILLION_BYTES = 1 << 20  # what is smaller stays in memory


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files, and a model whose matrices are large enough to be swapped."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault(
        "MAX_JOBS", "1"
    )  # compilers at a time: each takes a core and a gigabyte from other tests
    builders = pytest.importorskip("deepspeed.ops.op_builder")
    if not builders.AsyncIOBuilder().is_compatible():
        pytest.skip("libaio and its headers are not here: apt install libaio-dev")
    where = tmp_path_factory.mktemp("nvme")
    model = specimens.write_model(where / "model", tied=True, hidden_size=512, intermediate_size=1536)
    specimens.write(where, model)
    return where


def run(place, cell, *more):
    crew = Crew(cell.ranks, device="cpu")
    try:
        line = [*cells.line(cell, place, place / "model", device="cpu"), *more]
        return crew.run(measured.measure, line, steps=STEPS, timeout_s=600)
    finally:
        crew.kill()


@pytest.fixture(scope="module")
def alone(place):
    (found,) = run(place, Cell("sft", "ddp", "full", True, True, 1))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["none", "nvme"])
def test_what_waits_in_files_trains_the_same(parameters, place, alone, tmp_path):
    swap = [f"strategy.parameters={parameters}", f"strategy.nvme_path={tmp_path}"]
    cell = Cell("sft", "zero3_offload", "full", True, True, 2)
    ranks = run(place, cell, "strategy.optimizer=nvme", *swap)
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert certify.apart(ranks[0]["weights"], alone["weights"]) < 1e-5
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 50 * MILLION_BYTES, files
