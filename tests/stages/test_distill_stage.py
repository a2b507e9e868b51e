"""What a distillation loss says is the same of all tokens at once and a chunk of positions at a time."""

from types import SimpleNamespace

import pytest
import torch
from rows import batch, segments

from framework.batch import Distribution, TaughtBatch
from framework.losses.items import Items
from framework.losses.whole import Head
from framework.models import policy
from framework.stages.distill import DistillObjective

V, D, K = 11, 5, 7


def custom(student_logps, teacher_logps, weight):
    """Squared differences; a token that the teacher is sure of counts half, and has a metric of its own."""
    loss = (student_logps - teacher_logps).square().sum(1)
    surest = teacher_logps.amax(1).exp()
    sure = surest > 0.4
    unsure = torch.where(sure, torch.nan, loss.detach())
    return Items(loss, torch.where(sure, weight / 2, weight), {"surest": surest, "unsure": unsure})


class Engine:
    """A head of five numbers a position, three positions at a time."""

    world = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self):
        torch.manual_seed(0)
        self.hidden, self.weight = torch.randn(K, D), torch.randn(V, D).requires_grad_()

    def __call__(self, batch, *, distribution):
        rules = {"bias": None, "chunk": 3, "scale": 1.0, "softcap": None}
        return policy._candidates(self.hidden, self.weight, batch, distribution, rules)


@pytest.mark.parametrize("sft_share", [0.0, 0.4])
def test_a_loss_of_ones_own_keeps_its_weights_and_metrics(sft_share):
    """Seven rows in chunks of three, with metrics that do not apply to all of them."""
    torch.manual_seed(1)
    head = Head(torch.randn(K, 3), torch.randn(V, 3), None, 1.0, None)
    whole = (head.hidden @ head.weight.t()).log_softmax(1)
    plain = batch(segments([5, 4], V))
    engine, found = Engine(), []
    objective = DistillObjective(
        custom, Distribution(vocabulary=V, temperature=1.0), rest="bucket", sft_share=sft_share
    )
    every = torch.arange(V).expand(K, V)
    for ids, logps, later in ((every, whole, None), (None, None, head)):
        said = TaughtBatch(**vars(plain), teacher_ids=ids, teacher_logps=logps, teacher_head=later)
        items = objective(engine, said)
        (slope,) = torch.autograd.grad(items.total(), engine.weight)
        found.append({"loss": items.loss, "weight": items.weight, "slope": slope, **items.metrics})
    at_once, in_chunks = found
    assert set(in_chunks) == {"loss", "weight", "slope", "nll", "surest", "unsure"}
    assert 0 < in_chunks["unsure"].isnan().sum() < K
    for name, values in at_once.items():
        torch.testing.assert_close(in_chunks[name], values, equal_nan=True)
