"""The certificate: a part of it agrees, a planted error is caught, its choices of cells are what they say."""

import itertools
import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

from framework.config import cells, certified, certify, specimens
from framework.config.cells import AXES, Cell
from framework.config.measured import measure

COMMAND = Path(__file__).resolve().parents[2] / "launch" / "certify.py"
PART = [
    Cell("sft", "zeropp", "lora", False, True, 4),
    Cell("distill", "zero3_offload", "dora", True, False, 2),
    Cell("ppo", "zero1", "lora", True, True, 2),
]
"""Pairs that no other parity test has."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    place = tmp_path_factory.mktemp("certificate")
    model = specimens.write_model(place / "model", tied=True)
    specimens.write(place, model)
    running = certify.Certificate(place, model)
    yield running
    running.close()


@pytest.mark.slow
def test_a_part_agrees(certificate):
    found = list(certificate.run(PART))
    assert {one.verdict for one in found} == {"agrees"}, [
        (str(one.cell), one.verdict, one.differences, one.why) for one in found if one.verdict != "agrees"
    ]
    for one in found:  # a comparison with itself would find nothing either
        assert 0 < max(one.differences.values()) <= 1e-5, one


def averaging(world, line, *, steps):
    """A strategy that takes the mean over ranks where it must add."""
    from framework.strategy.ddp import DdpEngine

    def backward(self, loss):
        (loss / self.world.size).backward()

    with mock.patch.object(DdpEngine, "backward", backward):
        return measure(world, line, steps=steps)


def forgetting_a_micro_batch(world, line, *, steps):
    """A strategy that loses a thousandth of each step's last gradient."""
    from framework.strategy.ddp import DdpEngine

    backward = DdpEngine.backward

    def less(self, loss):
        backward(self, loss * (0.999 if self._last else 1.0))

    micro = DdpEngine.micro

    def noting(self, *, last):
        self._last = last
        return micro(self, last=last)

    with mock.patch.multiple(DdpEngine, backward=less, micro=noting):
        return measure(world, line, steps=steps)


@pytest.mark.parametrize("planted", [averaging, forgetting_a_micro_batch])
def test_a_planted_error_is_caught(planted, certificate):
    cell = Cell("sft", "ddp", "full", True, True, 2)
    (found,) = certificate.run([cell], planted)
    assert found.verdict == "disagrees"
    assert "gradient" in found.why
    assert found.differences["gradient"] > 9e-5


def test_in_bf16_spreading_adds_nothing_to_rounding(certificate):
    """A spread run is about as far from fp32 as a single process in bf16, and a planted error is further."""
    cell = Cell("dpo", "zero3", "lora", True, True, 2, "bf16")
    (found,) = certificate.run([cell])
    assert found.verdict == "agrees", found
    assert all(0 < found.differences[name] <= found.bounds[name] for name in certify.NAMES)
    (found,) = certificate.run([Cell("dpo", "ddp", "lora", True, True, 2, "bf16")], averaging)
    assert found.verdict == "disagrees"
    assert "gradient" in found.why


def test_what_the_configuration_refuses_is_no_failure(certificate):
    (found,) = certificate.run([Cell("grpo", "fsdp", "dora", True, True, 2)])
    assert found.verdict == "refused"
    assert found.why.endswith("type adapter=lora")


def test_rounded_answers_are_not_compared(certificate):
    (found,) = certificate.run([Cell("ppo", "ddp", "full", True, True, 2, "bf16")])
    assert found.verdict == "not compared"


def meetings(chosen):
    return {
        ((a, getattr(cell, a)), (b, getattr(cell, b)))
        for cell in chosen
        for a, b in itertools.combinations(AXES, 2)
    }


def test_the_half_and_the_cover_leave_no_pair_out():
    every = list(cells.every())
    assert len(set(every)) == len(every)
    half, cover = cells.half(every), cells.cover(every)
    assert 0.4 * len(every) < len(half) < 0.6 * len(every)
    assert len(cover) < 0.2 * len(every)
    assert meetings(cover) == meetings(every)
    # with a strategy that has one number of ranks only, some of these pairs are a single cell
    several = [cell for cell in every if cell.strategy not in cells.COPIES and cell.ranks == 2]
    assert meetings(several) <= meetings(half)


def run_command(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(sys, "argv", ["launch/certify.py", "--json", str(tmp_path / "c.json"), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(COMMAND), run_name="__main__")
    return ended.value.code


def test_the_command_ends_with_one_where_a_cell_disagrees(monkeypatch, tmp_path):
    """The verdicts are given here; what makes them is tested above."""

    def given(self, wanted, measure=None):
        for number, cell in enumerate(wanted):
            verdict = "disagrees" if number == spoilt else "agrees"
            differences = dict.fromkeys(certified.NAMES, 2e-5 if number == spoilt else 1e-7)
            yield certify.Found(cell, verdict, differences, why="loss is apart" * (number == spoilt))

    monkeypatch.setattr(certify.Certificate, "run", given)
    some = ["--stages", "sft", "--strategies", "ddp", "--page", str(tmp_path / "page.md")]
    spoilt = None
    assert run_command(monkeypatch, tmp_path, *some) == 0
    assert "Not in order" not in (tmp_path / "page.md").read_text()
    spoilt = 2
    assert run_command(monkeypatch, tmp_path, *some) == 1
    page = (tmp_path / "page.md").read_text()
    assert "| sft | ddp | dora | 6 | 2e-05 | 2e-05 | 2e-05 |" in page
    assert "## Not in order" in page
    written = json.loads((tmp_path / "c.json").read_text())
    assert len(written["cells"]) == 6 * len(cells.ADAPTERS)
    assert written["cells"][2]["why"] == "loss is apart"


def test_an_unknown_choice_is_refused(monkeypatch, tmp_path, capsys):
    assert run_command(monkeypatch, tmp_path, "--stages", "sft,pretraining") == 2
    assert "'pretraining'" in capsys.readouterr().err
