"""What keeps the model near its start besides replay: its keys and ranges. No value lives here.

What they mean is in `train.protect` and `train.interpolate`. See `config.schema` for the rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from framework.config.nodes import Node, Positive, Source, Text, refuse

if TYPE_CHECKING:
    from framework.config.schema import Run


class Protect(Node):
    lr_scale: Annotated[float, Field(gt=0, le=1)]
    freeze: tuple[Text, ...]
    pull: Annotated[float, Field(ge=0)]
    importance: Literal["even", "fisher"]
    sources: tuple[Source, ...]
    rows: Positive
    average: Annotated[float, Field(gt=0, lt=1)] | None
    interpolate: Literal["budget"] | Annotated[float, Field(gt=0, lt=1)] | None

    @property
    def chosen(self) -> bool:
        """Whether anything is done that could keep a budget of forgetting."""
        pulled = self.pull > 0 or self.average is not None or self.interpolate is not None
        return pulled or bool(self.freeze) or self.lr_scale < 1

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.importance == "fisher" and self.pull == 0:
            raise refuse(
                "protect.importance, protect.pull",
                "how hard each weight is pulled back, and no pull",
                "both or neither",
                "protect=ewc or protect.importance=even",
            )
        return self


def check(run: Run) -> None:
    """What a protection needs of the rest of the tree."""
    protect = run.protect
    if protect.interpolate == "budget" and run.replay.max_forgetting is None:
        raise refuse(
            "protect.interpolate, replay.max_forgetting",
            "the way back to the start until a budget is kept, and no budget",
            "how much may be forgotten, or a fixed share",
            "replay.max_forgetting=0.05 or protect.interpolate=0.5",
        )
    if run.adapter.kind != "full" and (protect.pull > 0 or protect.freeze):
        key = "pull" if protect.pull > 0 else "freeze"
        raise refuse(
            f"protect.{key}, adapter",
            f"protect.{key} of the model's weights, and adapter={run.adapter.kind}, which changes none "
            "of them",
            "a protection of what an adapter adds",
            "protect=interpolate, protect=average, protect=low_rate or a lower adapter.rank",
        )
    if protect.importance == "fisher" and not (protect.sources or run.replay.fed):
        raise refuse(
            "protect.importance, protect.sources",
            "weights that matter for text, and no text",
            "some of what must not be forgotten",
            "'protect.sources=[{path: general.jsonl}]'",
        )
