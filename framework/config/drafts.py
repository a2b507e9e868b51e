"""Where rows of a start model begin: of each way of asking, a stream of drafts that it goes on from.

A stream is told apart by all that decides its rows, so what was written is found again; how many rows are
wanted is no part of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from framework.config.nodes import Source as SourceNode
from framework.config.synthesis import Kind, Order
from framework.data import cache, reading, requests, sources, templates
from framework.data.chat import Encoder
from framework.data.fields import RowError
from framework.data.records import Message, Record
from framework.data.sources import Source
from framework.errors import ConfigError, DataError, ModelError
from framework.models.load import Description
from framework.rollout.asking import Draft, Drafts, Turn, Writer

VERSION = 1  # raise it whenever the same settings would give other rows
LARGE = 1_000_000_000  # parameters from which on models write requests that are worth answering
CLOSING = 8  # tokens that a template may put behind an answer
MARK = "\N{SNOWMAN}sapwood\N{SNOWMAN}"  # stands for a request while the template is looked at


class Beginning(Protocol):
    """One way of asking."""

    @property
    def most(self) -> int | None:
        """Drafts there are; None: without end."""

    def drafts(self, indices: Sequence[int], writer: Writer) -> Drafts:
        """Those of some numbers, as far as they are of use. Collective."""


@dataclass(frozen=True)
class Planned:
    """A stream and how much of it is wanted."""

    kind: Kind | str
    key: str  # of all that decides its rows
    rows: int
    beginning: Beginning = field(compare=False)
    marks: tuple[str, ...] = ()  # of the template, which no text may contain


def plans(order: Order, description: Description) -> list[Planned]:
    """The streams of an order. Raises UserError for one that this model cannot carry out."""
    tokenizer, chosen = description.tokenizer, order.synthesis
    template = templates.resolve(tokenizer, order.model.chat_template)
    asking = Asking(_encoder(order, description, template), template is not None)
    turn, marks = (None, ()) if template is None else _turn(asking.encoder)
    common = {
        "version": VERSION,
        "model": description.fingerprint,
        "template": template,
        "precision": order.precision,
        "max_length": order.max_length,
        **chosen.model_dump(include={"temperature", "top_p", "max_new_tokens", "min_new_tokens", "seed"}),
    }
    if order.refresh:
        rows = [row for source in order.refresh for row in reading.asked(as_source(source))]
        score = None if order.score is None else order.score.model_dump(mode="json")
        again = {"refresh": _digests(order.refresh), "score": score}
        return [_planned("refresh", common | again, len(rows), Refresh(asking, rows), marks)]
    kinds = _kinds(order, description, template)
    found = []
    for number, kind in enumerate(kinds):
        share = chosen.rows * (number + 1) // len(kinds) - chosen.rows * number // len(kinds)
        beginning: Beginning
        facts: dict[str, Any] = {"part": order.part}
        if kind == "start":
            beginning = Start(_begin(tokenizer))
        elif kind == "header":
            assert turn is not None  # `_kinds`
            beginning = Header(asking, turn)
        elif chosen.prompts is not None:
            given = [SourceNode(path=chosen.prompts)]
            facts = {"prompts": _digests(given)}
            beginning = Given(asking, list(reading.asked(as_source(given[0]))))
        else:
            beginning = Topics(asking, order.part)
        found.append(_planned(kind, common | facts, share, beginning, marks))
    return found


def _planned(
    kind: str, facts: Mapping[str, Any], rows: int, beginning: Beginning, marks: tuple[str, ...]
) -> Planned:
    return Planned(kind, f"{kind}-{cache.fingerprint({**facts, 'kind': kind})[:16]}", rows, beginning, marks)


def as_source(node: SourceNode) -> Source:
    return Source(**node.model_dump())


def _digests(given: Sequence[SourceNode]) -> list[str]:
    return [sources.locate(as_source(source)).digest for source in given]


def _kinds(order: Order, description: Description, template: str | None) -> tuple[Kind, ...]:
    chosen = order.synthesis
    if chosen.kinds is None:
        if chosen.prompts is not None:
            return ("topics",)
        if templates.resolve(description.tokenizer, None) is None:
            return ("start",)  # it was never taught the template that it may be given
        return ("topics", "header") if description.parameters >= LARGE else ("topics",)
    if "start" in chosen.kinds and len(chosen.kinds) > 1:
        raise ConfigError(
            f"synthesis.kinds: found {', '.join(chosen.kinds)}; expected start by itself, since it gives "
            "texts and the others conversations; type synthesis.kinds=[start] or leave it out"
        )
    needs = [kind for kind in chosen.kinds if kind == "header" or (kind == "topics" and not chosen.prompts)]
    if template is None and needs:
        raise ConfigError(
            f"synthesis.kinds: found {needs[0]}, and {order.model.path} has no chat template, so it goes on "
            "from text as it stands; expected start, or prompts of yours; type synthesis.kinds=[start] "
            "or synthesis.prompts=FILE.jsonl"
        )
    return chosen.kinds


def _encoder(order: Order, description: Description, template: str | None) -> Encoder:
    room = getattr(description.config.get_text_config(decoder=True), "max_position_embeddings", None)
    most = min(order.max_length, room or order.max_length)
    left = most - order.synthesis.max_new_tokens - CLOSING
    if left < 1:
        raise ConfigError(
            f"synthesis.max_new_tokens: found {order.synthesis.max_new_tokens} in rows of at most {most} "
            "tokens; expected room for a request before it; type "
            f"synthesis.max_new_tokens={max(1, most // 2)}"
        )
    return Encoder(
        description.tokenizer,
        template,
        max_length=left,
        truncation="drop",
        train_on="assistant",
        vocab_size=description.vocab_size,
    )


def _turn(encoder: Encoder) -> tuple[Turn, tuple[str, ...]]:
    """What stands around a user's turn, and those marks as text."""
    before, found, after = encoder.text(Message("user", MARK, False)).partition(MARK)
    if not found:
        raise ModelError(
            "the chat template does not write a user's turn as it stands; set model.chat_template to another"
        )
    ids = encoder.tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
    closing = next((line.strip() for line in after.splitlines() if line.strip()), "")
    opening = next((line.strip() for line in reversed(before.splitlines()) if line.strip()), "")
    # Of several marks on a line the first closes: <|eot_id|><|start_header_id|>...
    special = [str(token) for token in encoder.tokenizer.added_tokens_decoder.values() if token.special]
    closing = next((mark for mark in special if closing.startswith(mark)), closing)
    return Turn(tuple(ids), closing), (opening, closing)


def _begin(tokenizer: Any) -> tuple[int, ...]:
    """The token that texts begin with: its own, the one the tokenizer writes, or the one that parts texts."""
    written = tokenizer("")["input_ids"][:1]
    options = (tokenizer.bos_token_id, *written, tokenizer.eos_token_id)
    return (next(token for token in options if token is not None),)


@dataclass(frozen=True)
class Asking:
    """Requests as what a model goes on from."""

    encoder: Encoder
    chat: bool

    def draft(
        self, index: int, record: Record, row: Mapping[str, Any], gold: str | None = None
    ) -> Draft | None:
        """None where it is over-long, or the template refuses it."""
        (ids,) = self.encoder.prompts([record])
        return None if isinstance(ids, RowError) else Draft(index, tuple(ids.tolist()), row, gold)

    def request(self, index: int, text: str, **facts: Any) -> Draft | None:
        """Of one turn of the user."""
        return self.draft(
            index, Record((Message("user", text, False),)), {"messages": [_user(text)], **facts}
        )

    def asked(self, index: int, asked: reading.Asked, gold: str | None = None) -> Draft | None:
        """Of a row of the user's. Raises DataError for a conversation and a model without a template."""
        if asked.record.text is None and not self.chat:
            raise DataError("a conversation, for a model without a chat template", path=asked.where)
        return self.draft(index, asked.record, _without_answer(asked.record), gold)


def _without_answer(record: Record) -> dict[str, Any]:
    """A prompt as a row that its answer goes into."""
    if record.text is not None:
        return {"prompt": record.text}
    row: dict[str, Any] = {"messages": [message.as_template_input() for message in record.messages]}
    return row | ({"tools": list(record.tools)} if record.tools else {})


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@dataclass(frozen=True)
class Start:
    """Nothing is asked: text from its first word on."""

    begin: tuple[int, ...]
    most = None

    def drafts(self, indices: Sequence[int], writer: Writer) -> Drafts:
        return Drafts([Draft(index, self.begin, {}) for index in indices])


@dataclass(frozen=True)
class Header:
    """The model writes the request, too."""

    asking: Asking
    turn: Turn
    most = None

    def drafts(self, indices: Sequence[int], writer: Writer) -> Drafts:
        return writer.requests(self.turn, indices, self.asking.request)


@dataclass(frozen=True)
class Topics:
    """Built-in requests."""

    asking: Asking
    part: requests.Part
    most = None

    def drafts(self, indices: Sequence[int], writer: Writer) -> Drafts:
        def draft(index: int) -> Draft | None:
            stratum, text = requests.request(self.part, index)
            return self.asking.request(index, text, stratum=stratum)

        return _those(indices, draft)


@dataclass(frozen=True)
class Given:
    """Requests of the user's, over and over."""

    asking: Asking
    rows: Sequence[reading.Asked]
    most = None

    def drafts(self, indices: Sequence[int], writer: Writer) -> Drafts:
        return _those(indices, lambda index: self.asking.asked(index, self.rows[index % len(self.rows)]))


@dataclass(frozen=True)
class Refresh:
    """Rows that are to be answered anew, once each."""

    asking: Asking
    rows: Sequence[reading.Asked]

    @property
    def most(self) -> int | None:
        return len(self.rows)

    def drafts(self, indices: Sequence[int], writer: Writer) -> Drafts:
        """What is too long to be asked keeps its answer: a draft without anything to go on from."""

        def draft(index: int) -> Draft:
            asked = self.rows[index]
            kept = Draft(index, (), _without_answer(asked.record), asked.gold)
            return self.asking.asked(index, asked, asked.gold) or kept

        return _those(indices, draft)


def _those(indices: Sequence[int], draft: Callable[[int], Draft | None]) -> Drafts:
    made = [draft(index) for index in indices]
    kept = [each for each in made if each is not None]
    dropped = Drafts(kept)
    dropped.dropped["request over-long"] += len(made) - len(kept)
    return dropped
