"""Records to token ids and a mask of trained tokens, through the model's chat template.

Knows a tokenizer and a template, no file and no batch. A conversation is rendered once as text; the trained
parts are found as spans of characters, by the template's own `{% generation %}` marks or by rendering
prefixes of the conversation, and then mapped to tokens. What cannot be marked for certain is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from framework.data.fields import RowError
from framework.data.records import Message, Record
from framework.data.templates import CHOICES
from framework.errors import ModelError

Span = tuple[int, int]  # characters of the rendered text, end excluded

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A template may add boilerplate and tool descriptions, but text this much longer than its input is an attack
# or a mistake: [characters], and a factor on the input's characters.
RENDERED_FLOOR, RENDERED_FACTOR = 1_000_000, 50


@dataclass(frozen=True)
class Encoded:
    """One example of T tokens. Position 0 is never marked: nothing comes before it to predict it from."""

    input_ids: np.ndarray  # [T] int32
    trained: np.ndarray  # [T] bool, the tokens that are learnt
    truncated: bool

    def columns(self) -> dict[str, Any]:
        """What a table keeps of it."""
        lengths, counts = [len(self.input_ids)], [int(self.trained.sum())]
        return {"tokens": self.input_ids, "trained": self.trained, "lengths": lengths, "counts": counts}


class Encoder:
    """Turns records into tokens under one tokenizer, one template and one set of rules.

    `truncation` of rows over `max_length` tokens: "error" refuses the row like any bad row, "drop" leaves it
    out, "right" keeps its start, "left" keeps its end. `train_on`: "assistant" trains every assistant
    turn that the data does not exclude, "last_assistant" the last one only, "all" every token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        *,
        max_length: int,
        truncation: str,
        train_on: str,
        vocab_size: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.truncation = truncation
        self.train_on = train_on
        self.vocab_size = vocab_size
        self.marked = template is not None and GENERATION.search(template) is not None
        self.special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)

    def encode(self, records: Sequence[Record]) -> list[Encoded | RowError]:
        """One answer per record, in order; rows that cannot be used come back as RowError.

        Raises ModelError when the fault is the template's or the tokenizer's, whatever the row.
        """
        answers: list[Encoded | RowError | None] = [None] * len(records)
        chats: list[tuple[int, str, list[Span]]] = []
        texts: list[tuple[int, str, list[Span]]] = []
        for i, record in enumerate(records):
            try:
                if record.text is not None:
                    start = 0 if self.train_on == "all" else record.trained_from
                    texts.append((i, record.text, [(start, len(record.text))]))
                else:
                    chats.append((i, *self._render(record)))
            except RowError as error:
                answers[i] = error
        for rendered, is_chat in ((chats, True), (texts, False)):
            for i, answer in self._tokenize(rendered, is_chat):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def prompts(self, records: Sequence[Record]) -> list[np.ndarray | RowError]:
        """Token ids [T] int32 up to where an answer begins; "over-long" where they exceed `max_length`.

        Conversations end with the template's generation prompt, texts as they are.
        """
        answers: list[np.ndarray | RowError | None] = [None] * len(records)
        asked: dict[bool, list[tuple[int, str]]] = {True: [], False: []}  # chats, texts
        for i, record in enumerate(records):
            try:
                text = record.text
                if text is None:
                    text = self._text_of(record, len(record.messages), add_generation_prompt=True)
                asked[record.text is None].append((i, text))
            except RowError as error:
                answers[i] = error
        for is_chat, texts in asked.items():
            if not texts:
                continue
            encoding = self.tokenizer([text for _, text in texts], add_special_tokens=not is_chat)
            for (i, text), ids in zip(texts, encoding["input_ids"], strict=True):
                try:
                    answers[i] = self._finish_prompt(np.asarray(ids, dtype=np.int64), text, is_chat)
                except RowError as error:
                    answers[i] = error
        return [answer for answer in answers if answer is not None]

    # Rendering

    def _render(self, record: Record) -> tuple[str, list[Span]]:
        """The text of a conversation and the spans of its trained turns."""
        if self.template is None:
            raise ModelError(
                "the tokenizer has no chat template, so conversations cannot be rendered; "
                f"set model.chat_template to {CHOICES}"
            )
        messages = record.messages
        if self.train_on == "all":
            return self._text_of(record, len(messages)), []
        wanted = [i for i, message in enumerate(messages) if message.train]
        if self.train_on == "last_assistant":
            last = max(i for i, message in enumerate(messages) if message.role == "assistant")
            wanted = [i for i in wanted if i == last]
        if not wanted:
            raise RowError("no trained turn", "the last assistant turn is excluded from training (weight 0)")
        text, spans = self._marked(record, wanted) if self.marked else self._by_prefixes(record, wanted)
        for i, span in zip(wanted, spans, strict=True):
            self._check_calls(messages[i], text[slice(*span)])
        for tool in record.tools:
            name = (
                tool.get("function", tool).get("name")
                if isinstance(tool.get("function", tool), dict)
                else None
            )
            if isinstance(name, str) and name not in text:
                raise self._blind(f"the tool {name}")
        return text, spans

    def _marked(self, record: Record, wanted: Sequence[int]) -> tuple[str, list[Span]]:
        """Spans from `{% generation %}` blocks, one a turn of the assistant."""
        text, spans = self._apply(record.messages, record, marks=True)
        turns = [i for i, message in enumerate(record.messages) if message.role == "assistant"]
        if len(spans) != len(turns):
            raise ModelError(
                f"the chat template marks {len(spans)} parts as generated in a conversation with "
                f"{len(turns)} assistant turns; expected one {{% generation %}} block a turn: set "
                f"model.chat_template to {CHOICES}"
            )
        if not text[: spans[0][0]].strip():
            raise ModelError(
                "the chat template marks the conversation as generated from its first word on; expected "
                f"{{% generation %}} around the assistant's turns only: set model.chat_template to {CHOICES}"
            )
        by_turn = dict(zip(turns, spans, strict=True))
        return text, [by_turn[i] for i in wanted]

    def _by_prefixes(self, record: Record, wanted: Sequence[int]) -> tuple[str, list[Span]]:
        """Spans between the prompt for a turn and the conversation up to and with that turn.

        Right only where a longer conversation begins with the text of the shorter one. That is checked
        for each trained turn, since many templates drop earlier reasoning or add marks to the last turn.
        """
        text = self._text_of(record, len(record.messages))
        spans = []
        for i in wanted:
            ended = text if i + 1 == len(record.messages) else self._text_of(record, i + 1)
            prompt = self._text_of(record, i, add_generation_prompt=True)
            start = len(prompt)
            stable = text.startswith(ended)
            if not text.startswith(prompt):
                # The prompt may open what the finished turn does not have (<think>): go by what they share.
                start = _shared(text, prompt)
                stable = stable and start >= len(self._text_of(record, i))
            if not stable or start > len(ended):
                raise ModelError(
                    f"the chat template renders turn {i + 1} of {len(record.messages)} differently once "
                    "later turns follow (it is not prefix-stable), so its tokens cannot be marked for "
                    "certain; expected a template with {% generation %} marks or one that only appends: set "
                    f"data.train_on=last_assistant, or model.chat_template to {CHOICES}"
                )
            spans.append((start, len(ended)))
        return text, spans

    def text(self, message: Message) -> str:
        """One turn of the user, to be answered, as the template renders it."""
        return self._apply((message,), Record((message,)), add_generation_prompt=True)[0]

    def _text_of(self, record: Record, turns: int, *, add_generation_prompt: bool = False) -> str:
        if turns == 0:
            return ""
        return self._apply(record.messages[:turns], record, add_generation_prompt=add_generation_prompt)[0]

    def _apply(
        self,
        messages: Sequence[Message],
        record: Record,
        *,
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        """Render in transformers' immutable sandbox; templates come with models and are not trusted."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[[message.as_template_input() for message in messages]],
                tools=[dict(tool) for tool in record.tools] or None,
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template is not valid ({error.message}, line {error.lineno}); "
                f"set model.chat_template to {CHOICES}"
            ) from None
        except (jinja2.exceptions.SecurityError, OverflowError) as error:
            raise ModelError(f"the chat template does something forbidden: {error}") from None
        except (jinja2.TemplateError, TypeError) as error:
            raise RowError("template", f"the chat template refuses this conversation: {error}") from None
        (text,), spans = rendered
        given = sum(len(m.content) + len(str(m.extra)) for m in messages) + sum(
            len(str(t)) for t in record.tools
        )
        if len(text) > RENDERED_FLOOR + RENDERED_FACTOR * given:
            raise ModelError(
                f"the chat template made {len(text)} characters of a conversation of {given}; "
                "expected text of about its length: set model.chat_template"
            )
        return text, [(int(a), int(b)) for a, b in spans[0]] if marks else []

    def _check_calls(self, message: Message, rendered: str) -> None:
        for call in message.extra.get("tool_calls", ()):
            if call["function"]["name"] not in rendered:
                raise self._blind(f"the call of {call['function']['name']}")

    @staticmethod
    def _blind(what: str) -> ModelError:
        return ModelError(
            f"the chat template leaves out {what}, so it would not be trained on; expected a template "
            "that renders tools: set model.chat_template to a .jinja file or a template"
        )

    # Tokens

    def _tokenize(
        self, rendered: Sequence[tuple[int, str, list[Span]]], is_chat: bool
    ) -> list[tuple[int, Encoded | RowError]]:
        if not rendered:
            return []
        # Templates write the beginning-of-sequence token themselves; plain texts get it from the tokenizer.
        encoding = self.tokenizer([text for _, text, _ in rendered], add_special_tokens=not is_chat)
        answers: list[tuple[int, Encoded | RowError]] = []
        for row, (i, text, spans) in enumerate(rendered):
            ids = encoding["input_ids"][row]
            trained = np.zeros(len(ids), dtype=bool)
            if self.train_on == "all":
                trained[:] = True
            for span in spans:
                first, stop = self._tokens_of(encoding, row, ids, text, span, is_chat)
                trained[first:stop] = True
            try:
                finish = self._finish if is_chat else self._finish_text
                answers.append((i, finish(np.asarray(ids, dtype=np.int64), trained)))
            except RowError as error:
                answers.append((i, error))
        return answers

    def _tokens_of(
        self, encoding: Any, row: int, ids: list[int], text: str, span: Span, is_chat: bool
    ) -> Span:
        """First token and end of a span. A token that reaches over the span's start belongs to it: it is not
        what the prompt alone would have given."""
        start, stop = span
        if is_chat:
            stop = start + len(
                text[start:stop].rstrip()
            )  # without the line break after the end-of-turn token
        if stop <= start:
            return 0, 0
        first = last = None
        if encoding.is_fast:
            # A tokenizer may count a space to no token; the first character that has one decides.
            chars = range(start, stop)
            first = next((t for c in chars if (t := encoding.char_to_token(row, c)) is not None), None)
            last = next(
                (t for c in reversed(chars) if (t := encoding.char_to_token(row, c)) is not None), None
            )
        if first is None or last is None:
            first = self._shared_tokens(ids, text[:start], is_chat)
            last = self._shared_tokens(ids, text[:stop], is_chat) - 1
        end = last + 1
        if not is_chat:
            return first, len(ids)
        if ids[last] not in self.special and end < len(ids) and ids[end] in self.special:
            end += 1  # marks that close before the end-of-turn token
        if ids[end - 1] not in self.special:
            raise ModelError(
                "the chat template does not end assistant turns with a special token of the tokenizer (found "
                f"{text[max(start, stop - 12) : stop]!r} at the end of a turn), so the model would not learn "
                "to stop; "
                f"set model.chat_template to {CHOICES} that ends turns with such a token"
            )
        return first, end

    def _shared_tokens(self, ids: list[int], prefix: str, is_chat: bool) -> int:
        """Tokens that the text's ids share with those of one of its prefixes."""
        alone = self.tokenizer(prefix, add_special_tokens=not is_chat)["input_ids"]
        return _shared(ids, alone)

    def _finish_text(self, ids: np.ndarray, trained: np.ndarray) -> Encoded:
        """Texts end with a trained end-of-sequence token and begin with one beginning-of-sequence token."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so the model would not learn to stop; "
                "set eos_token in the model's tokenizer_config.json"
            )
        begun = self._begun(ids)
        ids, trained = begun, trained[len(ids) - len(begun) :]
        if len(ids) == 0 or ids[-1] != eos:
            ids, trained = np.append(ids, eos), np.append(trained, True)
        return self._finish(ids, trained)

    def _finish_prompt(self, ids: np.ndarray, text: str, is_chat: bool) -> np.ndarray:
        """A prompt is to be gone on from: without an end that the tokenizer added by itself."""
        if not is_chat:
            ids = self._begun(ids)
            ended = len(ids) > 0 and ids[-1] == self.tokenizer.eos_token_id
            if ended and not text.endswith(self.tokenizer.eos_token):
                ids = ids[:-1]
        self._check_vocabulary(ids)
        if len(ids) == 0:
            raise RowError("empty", "the prompt has no tokens")
        if len(ids) > self.max_length:
            raise RowError(
                "over-long",
                f"a prompt of {len(ids)} tokens, more than the {self.max_length} that are allowed; raise the "
                "limit, or pass data.truncation=drop",
            )
        return ids.astype(np.int32)

    def _begun(self, ids: np.ndarray) -> np.ndarray:
        """With one beginning-of-sequence token, where both a text and its tokenizer wrote one."""
        bos = self.tokenizer.bos_token_id
        twice = bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos
        return ids[1:] if twice else ids

    def _check_vocabulary(self, ids: np.ndarray) -> None:
        if self.vocab_size is not None and len(ids) and int(ids.max()) >= self.vocab_size:
            raise ModelError(
                f"the tokenizer gives token id {int(ids.max())}, but the model's vocabulary has "
                f"{self.vocab_size} entries; expected a tokenizer and a model that belong together: "
                "check model.path"
            )

    def _finish(self, ids: np.ndarray, trained: np.ndarray) -> Encoded:
        """Truncate, verify that something is trained and that every id is in the vocabulary."""
        self._check_vocabulary(ids)
        truncated = len(ids) > self.max_length
        if truncated:
            if self.truncation in ("error", "drop"):
                raise RowError(
                    "over-long",
                    f"{len(ids)} tokens, more than data.max_length={self.max_length}; raise it, or pass "
                    "data.truncation=right (keeps the start), left (keeps the end) or drop",
                )
            kept = slice(self.max_length) if self.truncation == "right" else slice(-self.max_length, None)
            ids, trained = ids[kept], trained[kept]
        trained = trained.copy()
        trained[:1] = False
        if not trained.any():
            cause = f"after truncation to {self.max_length} tokens" if truncated else "in it"
            raise RowError("no trained token", f"no token to train on {cause}")
        return Encoded(ids.astype(np.int32), trained, truncated)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
