"""Supervised losses against hand-computed cases (`tests/golden/losses.json`)."""

import json
from pathlib import Path

import pytest
import torch

from framework.losses.items import Items
from framework.losses.logprobs import token_logps
from framework.losses.sft import dft, sft

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "losses.json").read_text())
CASE = next(case for case in GOLDEN["cases"] if case["name"] == "sft_normalisation")
GIVEN, EXPECTED = CASE["inputs"], CASE["expected"]


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_token_mean_over_ranks_and_micro_batches():
    """N = 10 tokens in 2 ranks x 2 micro-batches: sum(nll) / N = 1.1, whatever the cut. Times the world
    size it is what each micro-batch contributes where ranks are averaged instead of added."""
    ranks = GIVEN["per_token_nll"].values()
    parts = [[sft(-_tensor(m), torch.ones(len(m), dtype=torch.float64)) for m in rank] for rank in ranks]
    units = sum(float(items.weight.sum()) for rank in parts for items in rank)
    shares = [[float(items.total()) / units for items in rank] for rank in parts]
    assert sum(map(sum, shares)) == pytest.approx(EXPECTED["global_token_mean"], rel=1e-12)
    world_size = GIVEN["world_size"]
    for rank, name in zip(shares, ("rank0", "rank1"), strict=True):
        averaged = [share * world_size for share in rank]
        assert averaged == pytest.approx(EXPECTED["backward_loss_per_microbatch"][name], rel=1e-12)


def test_label_smoothing_through_the_head():
    """The identity as weight makes the rows of `hidden` the logits."""
    case = GIVEN["label_smoothing"]
    logits = _tensor(case["logits"])
    eye = torch.eye(logits.shape[1], dtype=torch.float64)
    logps, _, means, _ = token_logps(logits, eye, torch.tensor(case["targets"]), means=True)
    weight = torch.ones(2, dtype=torch.float64)
    smooth = sft(logps, weight, means, label_smoothing=case["eps"])
    assert float(smooth.total()) / 2 == pytest.approx(EXPECTED["label_smoothed_loss"], rel=1e-12)
    assert float(smooth.metrics["nll"].mean()) == pytest.approx(EXPECTED["plain_nll"], rel=1e-12)
    plain = sft(logps, weight)
    assert float(plain.total()) / 2 == pytest.approx(EXPECTED["plain_nll"], rel=1e-12)


def test_dft_value_and_gradient():
    logps = _tensor(GIVEN["dft"]["token_logprobs"]).requires_grad_()
    loss = dft(logps, torch.ones_like(logps)).total() / len(logps)
    assert loss.item() == pytest.approx(EXPECTED["dft_loss"], rel=1e-12)
    loss.backward()
    torch.testing.assert_close(logps.grad, _tensor(EXPECTED["dft_grad_wrt_each_logprob"]))


def test_a_token_that_does_not_count_cannot_poison_the_sum():
    logps = torch.tensor([-1.0, -torch.inf, -3.0])
    items = sft(logps, torch.tensor([1.0, 0.0, 0.5]))
    assert isinstance(items, Items)
    assert float(items.total()) == 2.5


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_smoothing_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match="outside"):
        sft(torch.zeros(1), torch.ones(1), torch.zeros(1), label_smoothing=share)


def test_smoothing_without_the_mean_is_refused():
    with pytest.raises(ValueError, match="mean_logps"):
        sft(torch.zeros(1), torch.ones(1), label_smoothing=0.1)
