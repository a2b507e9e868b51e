"""Every stage with every loss of conf/: those that fit bind, the others are refused by name."""

import pytest
import yaml

from framework.config import names, targets
from framework.config.compose import CONF, check, compose
from framework.config.nodes import Target
from framework.errors import ConfigError

GROUPS = names.groups([CONF])
POLICY_GRADIENTS = {
    *("cispo", "dapo", "dr_grpo", "gmpo", "grpo", "gspo", "ppo"),
    *("reinforce", "reinforce_plus_plus", "rloo", "sapo"),
}
SUPERVISED = {"sft", "dft", "stm", "flow"}
DIVERGENCES = {"forward_kl", "jsd", "reverse_kl"}
FITTING = {
    "sft": SUPERVISED,
    "distill": DIVERGENCES,
    "reward": {"reward"},
    "ppo": POLICY_GRADIENTS,
    "grpo": POLICY_GRADIENTS,
    "preference": set(GROUPS["loss"]) - SUPERVISED - {"reward"} - POLICY_GRADIENTS - DIVERGENCES,
}
"""Which losses go with which stage: a loss that nothing names here is one of preferences."""
GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]", "reward=verifier"]
NEEDED = {"distill": ["stage.teacher=some/teacher"]}  # by a stage besides


@pytest.fixture(scope="module")
def runs():
    """A run of each stage, and each loss: put together by pairs."""
    stages = {stage: compose([*GIVEN, f"stage={stage}", *NEEDED.get(stage, [])]) for stage in GROUPS["stage"]}
    files = {name: (CONF / "loss" / f"{name}.yaml").read_text() for name in GROUPS["loss"]}
    return stages, {name: Target.model_validate(yaml.safe_load(text)) for name, text in files.items()}


@pytest.mark.parametrize("stage", GROUPS["stage"])
def test_a_stage_takes_its_losses_and_refuses_the_others_by_name(stage, runs):
    stages, losses = runs
    assert set(targets.losses_of(stage)) == FITTING[stage]
    for name, loss in losses.items():
        run = stages[stage].model_copy(update={"loss": loss})
        if name in FITTING[stage]:
            targets.loss(run)
            continue
        with pytest.raises(ConfigError) as refused:
            targets.loss(run)
        message = str(refused.value)
        head, _, rest = message.partition(": ")
        assert f"loss={name}" in head.split(" or ")  # two files may say the same
        assert rest.startswith(f"{loss.target} asks for "), message
        assert f"expected a loss of stage={stage}, which offers " in message
        of = " or ".join(f"stage={other}" for other in FITTING if name in FITTING[other])
        usual = targets.USUAL[stage]
        rest = f" or one of {', '.join(sorted(FITTING[stage] - {usual}))}" if len(FITTING[stage]) > 1 else ""
        assert message.endswith(f"; type loss={usual}{rest}; this one goes with {of}")


def test_what_a_refusal_says_to_type_is_accepted():
    with pytest.raises(ConfigError) as refused:
        check([*GIVEN, "stage=preference", "loss=grpo"])
    told = str(refused.value)
    assert told.startswith("loss=grpo: framework.losses.policy_gradient.ppo asks for advantages, logps, ")
    assert "; type loss=dpo or one of alphapo, aot, " in told
    assert told.endswith("; this one goes with stage=ppo or stage=grpo")
    check([*GIVEN, "stage=preference", "loss=dpo"])
    check([*GIVEN, "stage=ppo", "loss=grpo"])
    check([*GIVEN, "stage=grpo", "loss=grpo"])


def test_a_loss_that_was_changed_is_called_by_its_function():
    with pytest.raises(ConfigError, match=r"loss\._target_: framework\.losses\.dpo\.dpo asks for policy"):
        check([*GIVEN, "stage=reward", "loss=dpo", "loss.beta=0.2"])


def test_a_setting_that_breaks_what_a_loss_reads_is_refused():
    """`losses` decides which inputs a mixture asks for, so it is read before the loss is called."""
    with pytest.raises(ConfigError, match=r"loss\.losses=None.* framework.losses.mixed.mixed refuses"):
        check([*GIVEN, "stage=preference", "loss=mpo", "loss.losses=null"])
