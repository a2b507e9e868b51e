"""Which inputs a loss asks for, as it is bound."""

from functools import partial

from framework.losses.dpo import dpo
from framework.losses.inputs import inputs, optional
from framework.losses.mixed import mixed
from framework.losses.policy_gradient import ppo
from framework.losses.sft import sft
from framework.losses.simpo import simpo

TOKENS = {"logps", "old_logps", "advantages", "weight", "correction"}


def test_positional_parameters_are_inputs_and_keywords_are_settings():
    assert inputs(partial(dpo, beta=0.1)) == {"policy", "reference", "weight"}
    assert inputs(partial(simpo, beta=2.0, gamma=1.0)) == {"policy", "weight"}
    assert inputs(dpo) == {"policy", "reference", "weight"}


def test_what_a_coefficient_of_zero_multiplies_is_not_asked_for():
    assert inputs(partial(sft)) == {"logps", "weight"}
    assert inputs(partial(sft, label_smoothing=0.1)) == {"logps", "weight", "mean_logps"}
    bound = partial(ppo, clip_low=0.2, clip_high=0.2)
    assert inputs(bound) == TOKENS
    assert inputs(partial(bound, kl=0.05)) == TOKENS | {"reference_logps"}
    assert inputs(partial(bound, entropy=0.01)) == TOKENS | {"entropies"}


def test_a_mixture_asks_for_what_its_parts_do():
    assert inputs(partial(mixed, losses={"simpo": 1.0})) == {"policy", "weight"}
    mpo = partial(mixed, losses={"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0})
    assert inputs(mpo) == {"policy", "weight", "reference", "tokens_per_pair"}
    assert inputs(partial(mixed, losses={"odpo": 1.0})) == {"policy", "weight", "reference", "margin"}


def test_a_users_own_loss():
    def own(policy, weight, *, beta=0.1): ...

    @optional(margin=lambda settings: settings["scale"] > 0)
    def other(policy, margin=None, *, scale=0.0): ...

    assert inputs(own) == {"policy", "weight"}
    assert inputs(other) == {"policy"}
    assert inputs(partial(other, scale=1.0)) == {"policy", "margin"}
