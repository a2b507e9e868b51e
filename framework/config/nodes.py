"""Parts of the tree that every stage has: types, ranges and pairs that are refused. No value lives here.

See `config.schema` for the rules.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Text = Annotated[str, Field(min_length=1)]


def refuse(keys: str, found: str, expected: str, type_this: str) -> PydanticCustomError:
    """A refusal that belongs to several keys at once; `keys` leads the message."""
    return PydanticCustomError(
        "pair",
        "{keys}: {found}; expected {expected}; type {type_this}",
        {"keys": keys, "found": found, "expected": expected, "type_this": type_this},
    )


class Node(BaseModel):
    """A part of the tree: strict types, no other keys, never changed once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Target(BaseModel):
    """A function with some of its keywords. `config.targets` binds them; here they are carried only."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, serialize_by_alias=True)

    target: str = Field(alias="_target_", pattern=r"^[A-Za-z]\w*(\.[A-Za-z]\w*)+$")
    partial: Literal[True] = Field(alias="_partial_")

    @property
    def keywords(self) -> dict[str, Any]:
        """What the function is bound with."""
        return dict(self.__pydantic_extra__ or {})


class RewardFunction(BaseModel):
    """A function of one answer and its row, with some of its keywords."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, serialize_by_alias=True)

    target: str = Field(alias="_target_", pattern=r"^[A-Za-z]\w*(\.[A-Za-z]\w*)+$")
    name: Name | None = None
    weight: float = 1.0
    only_exact: bool = False
    only_finished: bool = False

    @property
    def keywords(self) -> dict[str, Any]:
        """What the function is bound with."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def called(self) -> str:
        """What its metrics are called."""
        return self.name or self.target.rpartition(".")[2]


class Model(Node):
    path: Text
    revision: Text | None
    gguf_file: Text | None
    init: Literal["pretrained", "random"]
    attention: Literal["auto", "eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3"]
    activation_checkpointing: Literal["none", "selective", "full"]
    activation_offload: bool
    compile: Literal["none", "blocks"]
    fp8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None
    fp8_emulate: bool
    head_chunk_tokens: Positive
    neftune_alpha: Annotated[float, Field(gt=0)] | None
    chat_template: Text | None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.gguf_file is not None and self.init == "random":
            raise refuse(
                "model.gguf_file, model.init",
                "a GGUF file and new random weights",
                "one of the two",
                "model.init=pretrained or model.gguf_file=null",
            )
        if self.fp8_emulate and self.fp8 is None:
            raise refuse(
                "model.fp8_emulate, model.fp8",
                "8-bit floats to be emulated, and none asked for",
                "both or neither",
                "model.fp8=tensorwise or model.fp8_emulate=false",
            )
        return self


class Full(Node):
    kind: Literal["full"]


class Lora(Node):
    kind: Literal["lora"]
    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    dropout: Share
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)]


class Dora(Lora):
    kind: Literal["dora"]  # type: ignore[assignment]


class Qlora(Lora):
    kind: Literal["qlora"]  # type: ignore[assignment]
    double_quantisation: bool


class Source(Node):
    """One source of rows. The only defaults of the schema: members of a list have no YAML of their own."""

    path: Text
    format: Literal[
        "auto",
        "messages",
        "prompt_completion",
        "alpaca",
        "sharegpt",
        "text",
        "preference",
        "ranking",
        "unpaired",
        "prompt",
    ] = "auto"
    weight: Annotated[float, Field(gt=0)] | None = None
    name: Name | None = None
    split: Text = "train"
    licence: Text | None = None


class Data(Node):
    train: tuple[Source, ...]
    eval: tuple[Source, ...]
    max_length: Positive
    packing: bool
    shuffle: bool
    truncation: Literal["error", "drop", "right", "left"]
    on_bad_row: Literal["error", "drop"]
    train_on: Literal["assistant", "last_assistant", "all"]
    cache_dir: Text
    workers: Positive | None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if len({source.weight is None for source in self.train}) > 1:
            weighed = ", ".join(f"{{path: {s.path}, weight: {s.weight or 1}}}" for s in self.train)
            raise refuse(
                "data.train",
                "weights for some sources only",
                "a weight for each source or for none",
                f"'data.train=[{weighed}]'",
            )
        return self


class Batch(Node):
    sequences: Positive
    tokens_per_micro: Positive


class Optim(Node):
    lr: Annotated[float, Field(gt=0)]
    betas: tuple[Share, Share]
    eps: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    max_skipped_steps: Positive


class Warmup(Node):
    warmup_steps: Annotated[int, Field(ge=0)] | None  # exactly one of the two is set
    warmup_fraction: Share | None

    @model_validator(mode="after")
    def _one(self) -> Self:
        exactly_one(
            "schedule.warmup_steps", self.warmup_steps, "schedule.warmup_fraction", self.warmup_fraction
        )
        return self


class Constant(Warmup):
    name: Literal["constant"]


class Linear(Warmup):
    name: Literal["linear"]
    min_ratio: Annotated[float, Field(ge=0, le=1)]


class Cosine(Warmup):
    name: Literal["cosine"]
    min_ratio: Annotated[float, Field(ge=0, le=1)]


class Wsd(Warmup):
    name: Literal["wsd"]
    min_ratio: Annotated[float, Field(ge=0, le=1)]
    decay_fraction: Annotated[float, Field(gt=0, le=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup_fraction is not None and self.warmup_fraction + self.decay_fraction > 1:
            raise refuse(
                "schedule.warmup_fraction, schedule.decay_fraction",
                f"shares of {self.warmup_fraction:g} and {self.decay_fraction:g}",
                "at most 1 together",
                f"schedule.decay_fraction={1 - self.warmup_fraction:g}",
            )
        return self


class Evaluate(Node):
    every: Positive | None
    at_start: bool
    max_examples: Positive | None
    metric: Text | None
    goal: Literal["min", "max"]
    samples: Annotated[int, Field(ge=0)]
    retention: tuple[Source, ...]
    prompts: tuple[Source, ...]
    score: RewardFunction | None


class Retain(Node):
    builtin: bool
    every: Positive | None
    rows: Annotated[int, Field(ge=2)] | None
    cost: Annotated[float, Field(gt=0, lt=1)]
    prompts: tuple[Source, ...]
    score: RewardFunction | None
    ask_every: Positive


class Checkpoint(Node):
    every: Positive | None
    keep: Positive
    export: bool


class Wandb(Node):
    project: Text
    entity: Text | None
    group: Text | None
    tags: tuple[Text, ...]
    mode: Literal["auto", "online", "offline"]
    checkpoints: bool
    timeout_s: Annotated[float, Field(gt=0)]


class Tracking(Node):
    every: Positive
    console: Literal["auto", "rich", "plain", "none"]
    report: bool
    tensorboard: bool
    wandb: Wandb | None


class Launch(Node):
    nproc: Positive
    nnodes: Positive
    node_rank: Annotated[int, Field(ge=0)]
    master_addr: Text | None
    master_port: Annotated[int, Field(gt=0, lt=65536)] | None
    device: Literal["auto", "cuda", "cpu"]
    threads: Positive | None
    grace_s: Annotated[float, Field(gt=0)]
    max_restarts: Annotated[int, Field(ge=0)]
    timeout_s: Annotated[float, Field(gt=0)]
    peak_tflops: Annotated[float, Field(gt=0)] | None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.node_rank >= self.nnodes:
            raise refuse(
                "launch.node_rank, launch.nnodes",
                f"machine {self.node_rank} of {self.nnodes}",
                f"launch.node_rank from 0 to {self.nnodes - 1}",
                f"launch.nnodes={self.node_rank + 1} launch.master_addr=HOST launch.master_port=29500",
            )
        if self.nnodes > 1 and (self.master_addr is None or self.master_port is None):
            raise refuse(
                "launch.nnodes, launch.master_addr, launch.master_port",
                f"{self.nnodes} machines that do not know where to meet",
                "the address of machine 0 and a free port on it",
                "launch.master_addr=HOST launch.master_port=29500",
            )
        return self


def exactly_one(first: str, a: object, second: str, b: object) -> None:
    if (a is None) == (b is None):
        found = "both null" if a is None else f"both given, {a} and {b}"
        type_this = f"{first}=NUMBER" if a is None else f"{second}=null"
        raise refuse(f"{first}, {second}", found, "exactly one of the two", type_this)
