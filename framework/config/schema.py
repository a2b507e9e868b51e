"""What a run may be asked to do: types, ranges and pairs that are refused. No value lives here.

Values and their meaning live in `conf/*.yaml`, one comment a key; this file knows which of them can be
carried out. It imports neither torch nor a room, so that a mistake is refused before anything heavy starts.
The composed tree is validated as JSON: strictly, unknown keys refused, lists become tuples, and the
result is frozen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator
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


class Sft(Node):
    name: Literal["sft"]


class Target(BaseModel):
    """A function with some of its keywords. `config.targets` binds them; here they are carried only."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, serialize_by_alias=True)

    target: str = Field(alias="_target_", pattern=r"^[A-Za-z]\w*(\.[A-Za-z]\w*)+$")
    partial: Literal[True] = Field(alias="_partial_")

    @property
    def keywords(self) -> dict[str, Any]:
        """What the function is bound with."""
        return dict(self.__pydantic_extra__ or {})


class Model(Node):
    path: Text
    revision: Text | None
    gguf_file: Text | None
    init: Literal["pretrained", "random"]
    attention: Literal["auto", "eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3"]
    activation_checkpointing: Literal["none", "selective", "full"]
    head_chunk_tokens: Positive
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
        return self


class Full(Node):
    kind: Literal["full"]


class Lora(Node):
    kind: Literal["lora"]
    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    dropout: Share
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)]


class Source(Node):
    """One source of rows. The only defaults of the schema: members of a list have no YAML of their own."""

    path: Text
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"] = "auto"
    weight: Annotated[float, Field(gt=0)] | None = None
    name: Name | None = None
    split: Text = "train"


class Data(Node):
    train: Annotated[tuple[Source, ...], Field(min_length=1)]
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


class Replay(Node):
    sources: tuple[Source, ...]
    fraction: Share

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.fraction > 0 and not self.sources:
            raise refuse(
                "replay.fraction, replay.sources",
                f"a share of {self.fraction:g} of no data",
                "sources to replay",
                "'replay.sources=[{path: general.jsonl}]' or replay=none",
            )
        if self.sources and self.fraction == 0:
            raise refuse(
                "replay.fraction, replay.sources",
                "sources of which nothing is replayed",
                "a share above 0",
                "replay.fraction=0.1",
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
        _exactly_one(
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


class Ddp(Node):
    name: Literal["ddp"]


class Fsdp(Node):
    name: Literal["fsdp"]
    reshard_after_forward: bool


class Zero3(Node):
    name: Literal["zero3"]


class Evaluate(Node):
    every: Positive | None
    at_start: bool
    max_examples: Positive | None
    metric: Text | None
    samples: Annotated[int, Field(ge=0)]


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
    timeout_s: Annotated[float, Field(gt=0)]


class Tracking(Node):
    every: Positive
    console: Literal["auto", "rich", "plain", "none"]
    report: bool
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


class Run(Node):
    """The whole tree of one stage of training."""

    name: Name | None
    run_dir: Text  # never null here: `compose` fills in the default
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    steps: Positive | None  # exactly one of steps and epochs is set
    epochs: Annotated[float, Field(gt=0)] | None
    precision: Literal["fp32", "bf16"]
    resume: Text  # auto, never or the path of a checkpoint
    trusted_packages: tuple[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], ...]
    stage: Sft
    loss: Target
    model: Model
    adapter: Annotated[Full | Lora, Field(discriminator="kind")]
    data: Data
    replay: Replay
    batch: Batch
    optim: Optim
    schedule: Annotated[Constant | Linear | Cosine | Wsd, Field(discriminator="name")]
    strategy: Annotated[Ddp | Fsdp | Zero3, Field(discriminator="name")]
    evaluate: Evaluate
    checkpoint: Checkpoint
    tracker: Tracking
    launch: Launch

    # Values that read the environment, as written, by their place: `config.record` saves them so.
    _withheld: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _together(self) -> Self:
        _exactly_one("steps", self.steps, "epochs", self.epochs)
        if self.data.max_length > self.batch.tokens_per_micro:
            raise refuse(
                "data.max_length, batch.tokens_per_micro",
                f"an example of {self.data.max_length} tokens cannot fit a micro-batch of "
                f"{self.batch.tokens_per_micro}",
                "data.max_length of at most batch.tokens_per_micro",
                f"batch.tokens_per_micro={self.data.max_length} or "
                f"data.max_length={self.batch.tokens_per_micro}",
            )
        if self.evaluate.every is not None and not self.data.eval:
            raise refuse(
                "evaluate.every, data.eval",
                f"evaluation every {self.evaluate.every} steps of no data",
                "sources to evaluate on",
                "'data.eval=[{path: held_out.jsonl}]' or evaluate.every=null",
            )
        world_size = self.launch.nproc * self.launch.nnodes
        if world_size > self.batch.sequences:
            raise refuse(
                "batch.sequences, launch.nproc",
                f"{self.batch.sequences} examples a step for {world_size} ranks",
                "at least one for each rank",
                f"batch.sequences={world_size}",
            )
        return self

    def decisive(self) -> dict[str, Any]:
        """What decides the numbers of training, as JSON: two runs with equal trees are the same run.

        How the work is cut, spread, watched and kept is left out, because a run may be stopped
        and go on under another strategy, world size or micro-batch.
        """
        tree: dict[str, Any] = self.model_dump(mode="json")
        for dotted in INCIDENTAL:
            *parents, leaf = dotted.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            del node[leaf]
        return tree

    def identity(self) -> str:
        """Eight hexadecimal digits of `decisive()`, equal on every machine and Python version."""
        return digest(self.decisive())


INCIDENTAL = (
    "name",
    "run_dir",
    "resume",
    "trusted_packages",
    "model.attention",
    "model.activation_checkpointing",
    "model.head_chunk_tokens",
    "data.eval",
    "data.packing",
    "data.cache_dir",
    "data.workers",
    "batch.tokens_per_micro",
    "strategy",
    "evaluate",
    "checkpoint",
    "tracker",
    "launch",
)
"""Keys that change neither which examples a step sees nor what is computed from them."""


def digest(tree: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of a JSON tree, whatever the order of its keys."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _exactly_one(first: str, a: object, second: str, b: object) -> None:
    if (a is None) == (b is None):
        found = "both null" if a is None else f"both given, {a} and {b}"
        type_this = f"{first}=NUMBER" if a is None else f"{second}=null"
        raise refuse(f"{first}, {second}", found, "exactly one of the two", type_this)
