"""What a line says of the sources of a step, over micro-batches and ranks."""

from types import SimpleNamespace

import pytest
import torch

from framework.losses.items import Items
from framework.train.meter import Meter

NAN = float("nan")


def meter(*ranks):
    """One of the first rank; the others have seen the given items."""
    others = []
    for items in ranks:
        other = Meter(
            SimpleNamespace(gather=lambda mine: others.append(mine) or [mine], device=torch.device("cpu"))
        )
        other.add(items)
        other.line()
    return Meter(SimpleNamespace(gather=lambda mine: [mine, *others], device=torch.device("cpu")))


def items(task, general):
    """Nats of trained tokens of two sources."""
    loss = torch.tensor([*task, *general])
    apart = {
        "loss/task": torch.tensor([*task, *[NAN] * len(general)]),
        "loss/general": torch.tensor([*[NAN] * len(task), *general]),
    }
    return Items(loss, torch.ones(len(loss)), apart)


def test_a_line_says_what_each_source_has_of_the_tokens_and_of_the_loss():
    """6 + 2 nats on task and 1 + 3 on general, of 3 and 5 tokens, over two ranks and two steps."""
    ours = meter(items([2.0], [1.0, 1.0, 1.0]))
    ours.add(items([3.0, 3.0], [0.5, 0.5]))
    ours.count({"trained_tokens": 5.0, "trained_tokens/task": 2.0, "trained_tokens/general": 3.0})
    ours.count({"trained_tokens": 3.0, "trained_tokens/task": 1.0, "trained_tokens/general": 2.0})
    line = ours.line()
    assert (line["trained_share/task"], line["trained_share/general"]) == (3 / 8, 5 / 8)
    assert line["loss_share/task"] == pytest.approx(8 / 12)
    assert line["loss_share/general"] == pytest.approx(4 / 12)
    assert line["loss"] == pytest.approx(12 / 8)


def test_parts_of_a_loss_that_are_no_sources_and_a_source_alone_have_no_share():
    ours = meter()
    ours.add(Items(torch.ones(2), torch.ones(2), {"loss/dpo": torch.ones(2)}))
    ours.count({"trained_tokens": 2.0, "trained_tokens/task": 2.0})
    assert not [name for name in ours.line() if "share" in name]
