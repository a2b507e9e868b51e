import math
from types import SimpleNamespace

import pytest
import torch

from framework.batch import Batch, Outputs
from framework.losses.items import Items
from framework.losses.sft import dft, sft
from framework.stages.sft import Supervised, TokenObjective


def batch(sources):
    """Three trained positions: two of the first segment, one of the second."""
    return Batch(
        input_ids=torch.zeros(1, 5, dtype=torch.int64),
        position_ids=torch.tensor([[0, 1, 2, 0, 1]]),
        boundaries=torch.tensor([0, 3, 5], dtype=torch.int32),
        trained=torch.tensor([0, 1, 3]),
        targets=torch.zeros(3, dtype=torch.int64),
        weights=torch.ones(3),
        segments=torch.tensor([0, 0, 1]),
        sources=torch.tensor(sources),
        packed=True,
        max_length=3,
        units=3.0,
    )


class Answers:
    """An engine that answers fixed log-probabilities and remembers what it was asked for."""

    world = SimpleNamespace(device=torch.device("cpu"))

    def __call__(self, batch, *, needs):
        self.needs = needs
        logps = torch.tensor([-1.0, -2.0, -4.0])
        return Outputs(logps, *(logps if name in needs else None for name in Outputs._fields[1:]))


def test_losses_are_told_apart_by_source_where_there_is_more_than_one():
    """Segment 0 is of the task (1 and 2 nats), segment 1 of replay (4 nats)."""
    items = TokenObjective(sft, ["task", "general"])(Answers(), batch([0, 1]))
    assert items.metrics["loss/task"][:2].tolist() == [1.0, 2.0]
    assert math.isnan(items.metrics["loss/task"][2])
    assert items.metrics["loss/general"][2] == 4.0
    assert not TokenObjective(sft, ["task"])(Answers(), batch([0, 0])).metrics


def test_a_loss_gets_what_it_asks_for_by_name():
    def entropic(logps, weight, entropies):
        return Items(-logps + entropies, weight)

    engine = Answers()
    items = TokenObjective(entropic)(engine, batch([0, 0]))
    assert engine.needs == {"entropies"}
    assert items.loss.tolist() == [0.0, 0.0, 0.0]
    TokenObjective(dft)(engine, batch([0, 0]))
    assert engine.needs == frozenset()


def test_the_stage_is_where_its_loader_is():
    class Loader:
        index = 0

        def next(self):
            self.index += 4
            return SimpleNamespace(micros=[batch([0, 0])], stats={"tokens": 5.0})

        def state_dict(self):
            return {"index": self.index}

        def load_state_dict(self, state):
            self.index = state["index"]

    stage = Supervised(Loader(), TokenObjective(sft), {"held": [batch([0, 0])]}, TokenObjective(sft))
    (term,) = stage.next(0)
    assert (term.stats["tokens"], term.scale, len(term.micros)) == (5.0, 1.0, 1)
    assert stage.state_dict() == {"index": 4}
    stage.load_state_dict({"index": 8})
    assert stage.state_dict() == {"index": 8}
    assert list(stage.held_out()) == ["held"]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_infinite_loss_counts_only_where_its_weight_is_positive(weight):
    items = Items(torch.tensor([2.0, math.inf]), torch.tensor([1.0, weight]))
    assert float(items.total()) == (2.0 if weight == 0 else math.inf)
