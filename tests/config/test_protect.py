"""Protections that the rest of the tree rules out: what is said, that it can be typed, and what is wired."""

import pytest
from torch import nn

from framework.config.compose import compose
from framework.errors import ConfigError
from framework.models.freezing import frozen

GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]"]
REFUSED = [
    ("protect=interpolate", "protect.interpolate, replay.max_forgetting", ["replay.max_forgetting=0.05"]),
    ("protect=l2sp adapter=lora", "protect.pull, adapter", ["protect=average"]),
    ("protect=freeze adapter=lora", "protect.freeze, adapter", ["protect=low_rate"]),
    ("protect=ewc", "protect.importance, protect.sources", ["protect.sources=[{path: general.jsonl}]"]),
    ("protect.importance=fisher", "protect.importance, protect.pull", ["protect.importance=even"]),
    ("replay.max_forgetting=0.05", "nothing that could keep it", ["protect=interpolate"]),
    ("replay.objective=start", "replay.objective, replay.sources", ["replay.objective=text"]),
    ("replay.scale_by=gradient", "replay.scale_by, replay.scale", ["replay.scale_by=raw"]),
    (
        "stage=distill stage.teacher=t replay=start replay.sources=[{path:x.jsonl}]",
        "replay.objective, stage.name",
        ["replay.objective=text"],
    ),
]


@pytest.mark.parametrize(("line", "told", "fix"), REFUSED)
def test_what_cannot_work_is_refused_and_what_is_suggested_is_taken(line, told, fix):
    with pytest.raises(ConfigError) as refused:
        compose([*GIVEN, *line.split()])
    assert told in str(refused.value)
    assert fix[0] in str(refused.value)
    compose([*GIVEN, *(a for a in line.split() if not fix[0].startswith(a.split("=")[0] + "=")), *fix])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.lm_head = (
            nn.Embedding(3, 2),
            nn.Linear(2, 2),
            nn.Linear(2, 3, bias=False),
        )
        self.lm_head.weight = self.embed.weight


def trained(patterns):
    return [name for name, p in frozen(Tied, patterns)().named_parameters() if p.requires_grad]


def test_what_fits_a_pattern_is_frozen_under_any_of_its_names():
    assert trained([]) == ["embed.weight", "layer.weight", "layer.bias"]
    assert trained(["*lm_head*"]) == ["layer.weight", "layer.bias"]
    assert trained(["*embed*", "*lm_head*", "*.bias"]) == ["layer.weight"]


@pytest.mark.parametrize(("patterns", "told"), [(["*embd*"], "fits no weight"), (["*"], "nothing to train")])
def test_patterns_that_do_nothing_or_leave_nothing_are_refused(patterns, told):
    with pytest.raises(ConfigError, match=told):
        trained(patterns)
