"""What is asked of a start model that is to write general text: types and ranges. No value lives here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from framework.config.nodes import Launch, Model, Node, Positive, RewardFunction, Source, Text

SELF = "self:"
"""The path of a source of `replay.sources` that the run's start model writes."""

Kind = Literal["topics", "header", "start"]


class Synthesis(Node):
    """How general text is written."""

    rows: Positive
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] | None
    prompts: Text | None
    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Positive
    min_new_tokens: Positive
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    batch_size: Positive


class Order(Node):
    """All that decides what is written, by which model and where."""

    model: Model
    synthesis: Synthesis
    precision: Literal["fp32", "bf16"]
    max_length: Positive  # tokens of a row, prompt and answer
    cache_dir: Text
    launch: Launch
    part: Literal["train", "probe"]  # of the built-in requests: the two share nothing
    refresh: tuple[Source, ...]  # rows to be answered anew; then nothing else is written
    score: RewardFunction | None
    trusted_packages: tuple[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], ...]
