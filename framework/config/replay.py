"""Rehearsal of what is not to be forgotten: its keys, ranges and what they rule out. No value lives here.

See `config.schema` for the rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from framework.config.nodes import Name, Node, Positive, Share, Source, Text, refuse
from framework.config.stage import SUPERVISED

if TYPE_CHECKING:
    from framework.config.schema import Run


class Replay(Node):
    sources: tuple[Source, ...]
    fraction: Share
    share_of: Literal["trained_tokens", "tokens", "rows"]
    additive: bool | None
    scale: Annotated[float, Field(gt=0)] | None
    scale_by: Literal["raw", "gradient"]
    measure_every: Positive
    sequences: Positive | None
    objective: Literal["text", "start"]
    likeliest: Positive
    max_forgetting: Annotated[float, Field(gt=0)] | Annotated[dict[Text, float], Field(min_length=1)] | None
    unit: Literal["relative_loss", "kl", "accuracy"]
    most: Annotated[float, Field(gt=0)] | None
    strata: Annotated[tuple[Name, ...], Field(min_length=1)] | None
    carry: Text | None  # auto, or the directory of a run
    stratum_tokens: Annotated[int, Field(ge=0)]
    select: Literal["uniform", "surprise"]
    excluded: tuple[Text, ...]

    @property
    def fed(self) -> bool:
        """Whether there may be something to replay."""
        return bool(self.sources) or self.carry is not None

    @property
    def idle(self) -> Replay:
        """The same where it turns out that there is nothing to replay."""
        unset = dict.fromkeys(("scale", "sequences", "max_forgetting", "most", "strata"))
        plain = {"sources": (), "fraction": 0.0, "scale_by": "raw", "objective": "text", "additive": None}
        return self.model_copy(update={**plain, **unset})

    @property
    def budgets(self) -> tuple[float, ...]:
        """Of all kinds of text together, or of each by itself; none without a budget."""
        given = self.max_forgetting
        return tuple(given.values()) if isinstance(given, dict) else () if given is None else (given,)

    @property
    def bound(self) -> tuple[str, ...] | None:
        """The kinds of text that are named as bound by a budget; None where none is."""
        return tuple(self.max_forgetting) if isinstance(self.max_forgetting, dict) else self.strata

    @property
    def start(self) -> float:
        """The share or coefficient to begin with."""
        return self.fraction if self.scale is None else self.scale

    @model_validator(mode="after")
    def _budgeted(self) -> Self:
        serving = [name for name in ("most", "strata") if getattr(self, name) is not None]
        if self.max_forgetting is None and serving:
            raise refuse(
                f"replay.{serving[0]}, replay.max_forgetting",
                f"replay.{serving[0]} and no budget that it could serve",
                "both or neither",
                f"replay.max_forgetting=0.01 or replay.{serving[0]}=null",
            )
        if self.max_forgetting is None or (not self.fed and self.most is None):
            return self  # without sources a budget is judged only, and nothing is steered
        key, limit = ("replay.fraction", 1.0) if self.scale is None else ("replay.scale", float("inf"))
        if self.most is None or not self.start <= self.most < limit or self.start == 0:
            most = min(max(5 * self.start, 0.1), 0.9) if self.scale is None else 5 * self.start
            given = "nothing" if self.most is None else f"{self.most:g}"
            raise refuse(
                f"{key}, replay.most",
                f"{self.start:g} to begin with and {given} at most",
                "a start above 0 and at most replay.most" + (", below 1" if self.scale is None else ""),
                f"{key}={self.start or 0.1:g} replay.most={most:g}",
            )
        return self

    @model_validator(mode="after")
    def _measured(self) -> Self:
        named = self.max_forgetting if isinstance(self.max_forgetting, dict) else {}
        for name, budget in named.items():
            if budget <= 0:
                raise refuse(
                    "replay.max_forgetting",
                    f"{budget:g} for {name}",
                    "a number > 0 for each kind of text",
                    f"'replay.max_forgetting={{{name}: 0.01}}'",
                )
        if named and self.strata is not None:
            raise refuse(
                "replay.max_forgetting, replay.strata",
                "budgets by kind of text, and kinds of text beside them",
                "the kinds that are bound by name once",
                "replay.strata=null",
            )
        if self.unit == "accuracy" and (over := [budget for budget in self.budgets if budget >= 1]):
            raise refuse(
                "replay.max_forgetting, replay.unit",
                f"{over[0]:g} of all right answers to be lost",
                "a share between 0 and 1",
                "replay.max_forgetting=0.02 for two points of accuracy",
            )
        return self

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.scale is None) != (self.sequences is None):
            raise refuse(
                "replay.scale, replay.sequences",
                "one of them without the other",
                "a coefficient and examples per step, or neither",
                "replay=term",
            )
        if self.scale_by == "gradient" and self.scale is None:
            raise refuse(
                "replay.scale_by, replay.scale",
                "a share of the gradient's norm, and no loss of replay's own that could have it",
                "a coefficient and examples per step, in stages that do not imitate",
                "replay=gradient or replay.scale_by=raw",
            )
        if self.scale_by == "gradient" and self.objective == "start":
            raise refuse(
                "replay.scale_by, replay.objective",
                "a share of the gradient's norm for a divergence from the start, whose gradient begins at 0",
                "one of the two",
                "replay.objective=text or replay.scale_by=raw",
            )
        type_this = "'replay.sources=[{path: general.jsonl}]', replay.carry=auto or replay=none"
        if self.scale is not None and not self.fed:
            raise refuse(
                "replay.scale, replay.sources",
                f"a coefficient of {self.scale:g} for no data",
                "sources to replay",
                type_this,
            )
        if self.fraction > 0 and not self.fed:
            raise refuse(
                "replay.fraction, replay.sources",
                f"a share of {self.fraction:g} of no data",
                "sources to replay",
                type_this,
            )
        if self.objective == "start" and not self.fed:
            raise refuse(
                "replay.objective, replay.sources",
                "what the start model says of the text replayed, and no text",
                "sources to replay",
                "'replay.sources=[{path: general.jsonl}]' or replay.objective=text",
            )
        if self.fed and self.fraction == 0 and self.scale is None:
            raise refuse(
                "replay.fraction, replay.sources" if self.sources else "replay.fraction, replay.carry",
                "sources of which nothing is replayed",
                "a share above 0",
                "replay.fraction=0.1",
            )
        if self.fraction == 0 and (self.share_of != "trained_tokens" or self.additive is not None):
            key = "additive" if self.additive is not None else "share_of"
            raise refuse(
                f"replay.{key}, replay.fraction",
                f"replay.{key} and no share of replay",
                "a share above 0, which supervised stages have",
                f"replay=fixed or replay.{key}={'null' if key == 'additive' else 'trained_tokens'}",
            )
        if self.carry is not None and self.stratum_tokens == 0:
            raise refuse(
                "replay.carry, replay.stratum_tokens",
                "earlier stages to rehearse by no token",
                "some tokens of each",
                "replay.stratum_tokens=200000 or replay.carry=null",
            )
        if self.select != "uniform" and self.stratum_tokens == 0:
            raise refuse(
                "replay.select, replay.stratum_tokens",
                f"rows chosen by {self.select} to be left, and none left",
                "some tokens to choose",
                "replay.stratum_tokens=200000 or replay.select=uniform",
            )
        return self


def check(run: Run) -> None:
    """Replay is mixed into supervised data and a term of its own beside any other."""
    by_answers = run.replay.unit == "accuracy"
    if run.replay.max_forgetting is not None and by_answers and not run.retain.prompts:
        raise refuse(
            "replay.unit, retain.prompts",
            "a budget of accuracy and no questions to answer",
            "questions that the start model answers right",
            "'retain.prompts=[{path: questions.jsonl}]' or replay.unit=relative_loss",
        )
    watched = run.retain.builtin or run.evaluate.retention or by_answers
    held = run.replay.fed or run.protect.chosen
    if run.replay.max_forgetting is not None and not (watched and held):
        raise refuse(
            "replay.max_forgetting, " + ("replay.sources" if watched else "evaluate.retention"),
            "a budget of forgetting and "
            + ("nothing that could keep it" if watched else "nothing it is measured on"),
            "data to replay or another protection, and text to watch",
            "'replay.sources=[{path: general.jsonl}]' or protect=interpolate"
            if watched
            else "retain=default",
        )
    if run.stage.name in SUPERVISED and run.replay.scale is not None:
        raise refuse(
            "replay.scale, stage.name",
            "a term of its own beside supervised data, where replay is mixed in",
            "a share of the trained tokens",
            "replay=fixed",
        )
    if run.stage.name not in SUPERVISED and run.replay.fraction > 0:
        raise refuse(
            "replay.fraction, stage.name",
            f"a share of {run.replay.fraction:g} of the trained tokens in stage {run.stage.name}",
            "a coefficient, since its losses are not of tokens to imitate",
            "replay=term",
        )
    if run.stage.name == "distill" and run.replay.objective == "start":
        raise refuse(
            "replay.objective, stage.name",
            "replay that follows the start model in stage distill, where all text follows the teacher",
            "one to follow",
            "replay.objective=text",
        )
    if run.stage.name == "reward" and run.replay.select != "uniform":
        raise refuse(
            "replay.select, stage.name",
            f"rows chosen by {run.replay.select}, and a reward model, which leaves none",
            "no choice",
            "replay.select=uniform",
        )
    if run.stage.name == "reward" and run.replay.fed:
        raise refuse(
            "replay.sources, stage.name",
            "text to rehearse, and a reward model, which writes none",
            "no replay",
            "replay=none",
        )
