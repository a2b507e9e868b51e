"""Parts of the tree that say what is trained for: the stage, its rollouts and rewards. No value lives here.

See `config.schema` for the rules.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from framework.config.nodes import Node, Positive, RewardFunction, Share, Text, refuse

Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Where = Literal["auto", "adapter", "frozen"]


def one_reference(path: str | None, where: str) -> None:
    """Refuse another model as reference beside the policy without its adapter."""
    if path is not None and where == "adapter":
        raise refuse(
            "stage.reference_path, stage.reference",
            "another model as reference, and the policy without its adapter",
            "one of the two",
            "stage.reference=frozen or stage.reference_path=null",
        )


class Sft(Node):
    name: Literal["sft"]


class Distill(Node):
    name: Literal["distill"]
    teacher: Text
    top_k: Positive | None
    rest: Literal["bucket", "renormalise"]
    temperature: AboveZero
    sft_share: Share
    own_share: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.top_k == 1 and self.rest == "renormalise":
            raise refuse(
                "stage.top_k, stage.rest",
                "one token whose probability is made 1 in both models, which teaches nothing",
                "more tokens, or the rest as one of its own",
                "stage.rest=bucket",
            )
        return self


class RewardModel(Node):
    name: Literal["reward"]
    margin_from_scores: bool


class Preference(Node):
    name: Literal["preference"]
    reference: Where | Literal["cached"]
    reference_path: Text | None
    sync_every: Positive | None
    sync_mix: Annotated[float, Field(gt=0, le=1)]
    ld_alpha: Annotated[float, Field(ge=0, le=1)]
    wpo: bool
    margin_from_scores: bool

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.sync_every is not None and self.reference != "frozen":
            raise refuse(
                "stage.sync_every, stage.reference",
                f"a moving reference that is {self.reference}",
                "a frozen copy, which alone can move",
                "stage.reference=frozen or stage.sync_every=null",
            )
        one_reference(self.reference_path, self.reference)
        return self


class Correction(Node):
    level: Literal["none", "token", "sequence", "geometric"]
    outside: Literal["truncate", "mask"]
    low: Annotated[float, Field(ge=0, le=1)]
    high: Annotated[float, Field(ge=1)]


class Shaping(Node):
    within_prompt: bool
    mean: float
    std: AboveZero
    running: bool
    missing_eos_penalty: NotNegative
    clip: AboveZero | None


class OnPolicy(Node):
    """What all reinforcement learning has."""

    prompts: Positive
    epochs: Positive
    averaging: Literal["token", "sequence", "constant"]
    extra_prompts: Count
    mask_truncated: bool
    stop_kl: AboveZero | None
    kl_coefficient: NotNegative
    kl_estimator: Literal["k1", "k2", "k3"]
    kl_target: AboveZero | None
    kl_horizon: AboveZero
    reference: Where
    reference_path: Text | None
    shaping: Shaping
    correction: Correction

    @model_validator(mode="after")
    def _controlled(self) -> Self:
        one_reference(self.reference_path, self.reference)
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise refuse(
                "stage.kl_target, stage.kl_coefficient",
                "an adaptive coefficient that begins at 0 and is multiplied",
                "a coefficient above 0",
                "stage.kl_coefficient=0.05 or stage.kl_target=null",
            )
        return self


class Ppo(OnPolicy):
    name: Literal["ppo"]
    gamma: Annotated[float, Field(gt=0, le=1)]
    gae_lambda: Annotated[float, Field(ge=0, le=1)]
    whiten_rewards: bool
    whiten_advantages: bool
    value_scale: AboveZero
    value_clip: AboveZero | None
    critic: Text | None
    critic_head: Literal["kept", "zeros"]
    critic_lr_scale: AboveZero
    critic_warmup: Count


class Grpo(OnPolicy):
    name: Literal["grpo"]
    advantages: Literal[
        "group_normalised",
        "group_centred",
        "leave_one_out",
        "batch_scaled",
        "best_of_group",
        "length_weighted",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "teacher",
    ]

    @model_validator(mode="after")
    def _taught(self) -> Self:
        if self.advantages != "teacher":
            return self
        if self.reference_path is None:
            raise refuse(
                "stage.advantages, stage.reference_path",
                "advantages from a teacher, and none given",
                "the teacher as the model to compare with",
                "stage.reference_path=DIRECTORY_OR_HUB_ID",
            )
        if self.kl_coefficient > 0:
            raise refuse(
                "stage.advantages, stage.kl_coefficient",
                f"advantages that are a KL to the teacher already, and a penalty of {self.kl_coefficient:g} "
                "on it",
                "one of the two",
                "stage.kl_coefficient=0",
            )
        if self.extra_prompts > 0:
            raise refuse(
                "stage.advantages, stage.extra_prompts",
                "prompts replaced by their rewards, of which a teacher learns nothing",
                "no replacing",
                "stage.extra_prompts=0",
            )
        return self


ONLINE = ("ppo", "grpo")
SUPERVISED = ("sft", "distill")  # learn token by token from text as it stands


def writes(stage: Node) -> bool:
    """Whether the policy answers prompts while it is trained."""
    return getattr(stage, "name", None) in ONLINE or getattr(stage, "own_share", 0.0) > 0


class Rollout(Node):
    """What every engine is told."""

    samples: Positive
    temperature: AboveZero
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Count
    max_new_tokens: Positive


class Hf(Rollout):
    engine: Literal["hf"]
    batch_size: Positive


class Vllm(Rollout):
    engine: Literal["vllm"]
    url: Text | None
    timeout_s: AboveZero
    memory_share: Annotated[float, Field(gt=0, le=1)]


class Rewards(Node):
    functions: tuple[RewardFunction, ...]
    environment: RewardFunction | None
    model: Text | None
    model_weight: float
    workers: Positive
    timeout_s: AboveZero
    memory_mib: Positive
    max_failed: Share

    @property
    def judging(self) -> tuple[RewardFunction, ...]:
        """All that is run in processes: the environment's verdict, then the functions."""
        return (*((self.environment,) if self.environment else ()), *self.functions)

    @property
    def empty(self) -> bool:
        return not self.judging and self.model is None
