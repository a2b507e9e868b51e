"""How much of a device is used: operations of real tokens over seconds, ranks and the device's peak."""

from types import SimpleNamespace

import pytest
import torch
from rows import batch, segments

from framework.config import speed
from framework.train.meter import Meter, Speed


class World:
    """Two ranks, of which the other has done three times as much."""

    size, device = 2, torch.device("cpu")

    def gather(self, mine):
        return [mine, mine | {"flops": 3 * mine["flops"]}]


def line(known):
    meter = Meter(World(), known)
    meter.work(batch(segments([3, 5], 10)))
    meter._clock -= 2.0  # two seconds ago
    return meter.line()


def test_a_line_tells_the_mean_rate_of_a_rank():
    """8 tokens of 1e12 each here and 24 there, in 2 s or a little more: 8e12 a second and rank, of 16e12."""
    found = line(Speed(lambda micro: 1e12 * micro.tokens, peak=16e12))
    assert found["seconds"] >= 2
    assert found["tflops"] == pytest.approx(16 / found["seconds"])
    assert found["mfu"] == pytest.approx(1 / found["seconds"])


def test_without_a_known_peak_there_is_no_share_of_it():
    found = line(Speed(lambda micro: 1e12))
    assert "tflops" in found
    assert "mfu" not in found
    assert "tflops" not in line(None)


def test_padding_costs_nothing():
    """Two segments of 3 and 5 tokens, packed and padded to 5."""
    cost = speed.Flops(100, 10, ((None, 1),))
    for packed in (True, False):
        micro = batch(segments([3, 5], 10), packed=packed)
        lengths = micro.boundaries.diff().tolist()
        assert cost.of(lengths, len(micro.trained), tokens=micro.tokens) == 800 + 60 + 6 + 15


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A400", None),
        ("some other device", None),
    ],
)
def test_the_longest_name_that_fits(name, peak):
    assert speed.known(name) == peak


def test_what_is_typed_rules():
    run = SimpleNamespace(launch=SimpleNamespace(peak_tflops=2.5), precision="fp32")
    assert speed.peak_of(run, torch.device("cpu")) == 2.5e12
    run.launch.peak_tflops = None
    assert speed.peak_of(run, torch.device("cpu")) is None
