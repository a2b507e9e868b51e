"""What is asked of a start model that is to write general text: types and ranges. No value lives here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from framework.config.nodes import Launch, Model, Node, Positive, RewardFunction, Source, Text, refuse

if TYPE_CHECKING:
    from framework.config.schema import Run

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


def check(run: Run) -> None:
    """What the start model writes is to be replayed, and only that."""
    given = {
        "data.train": run.data.train,
        "data.eval": run.data.eval,
        "evaluate.retention": run.evaluate.retention,
        "evaluate.prompts": run.evaluate.prompts,
        "retain.prompts": run.retain.prompts,
    }
    if misplaced := [key for key, sources in given.items() if any(s.path == SELF for s in sources)]:
        raise refuse(
            misplaced[0],
            f"{SELF}, text of the start model's own",
            f"{SELF} in replay.sources, or a file that launch/synthesise.py wrote",
            "replay=synthesised",
        )
    asked = sum(source.path == SELF for source in run.replay.sources)
    if asked > 1:
        raise refuse(
            "replay.sources",
            f"{SELF} {asked} times, of which each is the same text",
            "it once",
            "synthesis.rows=NUMBER for more of it",
        )
    if asked and run.model.init == "random":
        raise refuse(
            "replay.sources, model.init",
            f"{SELF} and a start model with new random weights, which has nothing to say",
            "a model that was trained",
            "model.init=pretrained or replay=none",
        )
    if asked and run.synthesis.max_new_tokens >= run.data.max_length:
        raise refuse(
            "synthesis.max_new_tokens, data.max_length",
            f"answers of {run.synthesis.max_new_tokens} tokens in examples of {run.data.max_length}",
            "room for a request before them",
            f"synthesis.max_new_tokens={max(1, run.data.max_length // 2)}",
        )
