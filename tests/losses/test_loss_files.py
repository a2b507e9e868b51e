"""The files of conf/loss: each binds, sets every keyword of its function, and computes."""

import inspect

import catalogue
import pytest
import yaml

from framework.config import targets
from framework.config.schema import Target
from framework.losses.inputs import inputs

FILES = catalogue.files()


@pytest.mark.parametrize("stem", FILES)
def test_a_file_binds_and_sets_every_keyword(stem):
    function, settings = FILES[stem]
    parameters = inspect.signature(function).parameters.values()
    assert set(settings) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    supplied = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    node = Target.model_validate(yaml.safe_load((catalogue.CONF / f"{stem}.yaml").read_text()))
    bound = targets.resolve(node, [], supplied=supplied)
    made_up = catalogue.made_up(bound)
    reads = {name: value for name, value in made_up.items() if name in inputs(bound)}
    assert bound(**reads).total().isfinite()


def test_every_loss_that_a_stage_takes_has_a_file():
    """Besides: the critic's loss, which is not named by `loss=`, and a mixture's sft."""
    named = {function for function, _ in FILES.values()}
    without = {name for name, function in catalogue.losses().items() if function not in named}
    assert without == {"chosen_sft", "value_loss"}
