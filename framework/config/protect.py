"""What keeps the model near its start besides replay: its keys and ranges. No value lives here.

What they mean is in `train.protect` and `train.interpolate`. See `config.schema` for the rules.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from framework.config.nodes import Node, Positive, Source, Text, refuse


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
