"""Tokenised answers: a prompt with K answers that are compared or liked, kept on disk like `data.tables`.

The prompt is stored once: what the tokens of all answers begin with, as far as nothing of it is trained.
What comes after the last trained token is left out, since nothing is predicted from it: an answer ends
with its end-of-turn token, and that is where a reward model reads. Letters: n examples, p prompt tokens,
a answer tokens, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from framework.data import preferences, tables, templates, tokenise
from framework.data.chat import Encoded, Encoder
from framework.data.fields import RowError
from framework.data.preferences import Judged
from framework.data.sources import Source
from framework.data.tables import Part, Table, starts
from framework.data.tokenise import Cached, Progress

ARRAYS = {
    **tables.ARRAYS,  # of [prompt, answer 1, ..., answer K] end to end
    "prompts": "<i4",  # [n] p
    "answers": "<i4",  # [n] K
    "sizes": "<i4",  # [sum of K] a
    "learnt": "<i4",  # [sum of K] trained tokens of each answer
    "pairs": "<i4",  # [n] N
    "better": "<i4",  # [sum of N] which of the example's answers
    "worse": "<i4",
    "margins": "<f4",
    "desirable": "|b1",  # [n]
}
UNLIMITED = 1 << 40  # tokens; lengths are judged once prompt and answers are known


class Answers(NamedTuple):
    """One example, as views of the file."""

    prompt: np.ndarray  # [p] int32
    ids: list[np.ndarray]  # K times [a] int32
    trained: list[np.ndarray]  # K times [a] bool
    pairs: np.ndarray  # [N, 2] which answer is better, which is worse
    margins: np.ndarray  # [N] fp32
    desirable: bool


@dataclass(frozen=True)
class AnswerTable(Table):
    """The n examples of one source. `lengths` count the prompt once, `trained` every answer once."""

    prompts: np.ndarray  # [n] int32, tokens
    answers: np.ndarray  # [n] int32, K
    _answer_offsets: np.ndarray  # [n + 1] int64, first answer of each example
    _pair_offsets: np.ndarray  # [n + 1] int64

    @classmethod
    def of(cls, cached: Cached) -> Self:
        """The table over arrays on disk."""
        plain, arrays = Table.of(cached), cached.arrays
        return cls(
            **vars(plain),
            prompts=np.asarray(arrays["prompts"]),
            answers=np.asarray(arrays["answers"]),
            _answer_offsets=starts(arrays["answers"]),
            _pair_offsets=starts(arrays["pairs"]),
        )

    def sizes(self, row: int) -> np.ndarray:
        """[K] tokens of the answers of one example."""
        return self._arrays["sizes"][self._answer_offsets[row] : self._answer_offsets[row + 1]]

    def learnt(self, row: int) -> np.ndarray:
        """[K] trained tokens of the answers of one example."""
        return self._arrays["learnt"][self._answer_offsets[row] : self._answer_offsets[row + 1]]

    def pairs(self, row: int) -> np.ndarray:
        """[N, 2] which answer is better, which is worse."""
        part = slice(self._pair_offsets[row], self._pair_offsets[row + 1])
        return np.stack([self._arrays["better"][part], self._arrays["worse"][part]], axis=1)

    def judged(self, row: int) -> Answers:
        """One example with its tokens."""
        ids, trained = self.example(row)
        prompt = int(self.prompts[row])
        cuts = prompt + np.cumsum(self.sizes(row))[:-1]
        part = slice(self._pair_offsets[row], self._pair_offsets[row + 1])
        return Answers(
            ids[:prompt],
            np.split(ids[prompt:], cuts - prompt),
            np.split(trained[prompt:], cuts - prompt),
            self.pairs(row),
            self._arrays["margins"][part],
            bool(self._arrays["desirable"][row]),
        )

    def parts(self, row: int) -> list[Part]:
        """One example for people: the prompt, then each answer."""
        found = self.judged(row)
        if len(found.ids) == 1:
            titles = ["desirable" if found.desirable else "undesirable"]
        elif len(found.ids) == 2:
            titles = ["rejected", "rejected"]
            titles[found.pairs[0, 0]] = "chosen"
        else:
            wins = np.bincount(found.pairs[:, 0], minlength=len(found.ids))
            titles = [f"answer {k + 1}, better than {n}" for k, n in enumerate(wins)]
        untrained = np.zeros(len(found.prompt), dtype=bool)
        answers = zip(titles, found.ids, found.trained, strict=True)
        return [Part("prompt", found.prompt, untrained), *(Part(*answer) for answer in answers)]


def prepare_comparisons(
    wanted: Sequence[Source],
    *,
    tokenizer: Any,
    chat_template: str | None = None,
    max_length: int,
    truncation: str = "error",
    margin_from_scores: bool = False,
    on_bad_row: str = "error",
    cache_dir: str | Path,
    workers: int | None = 1,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> list[AnswerTable]:
    """One table of pairs and rankings per source; settings as in `tables.prepare`.

    `max_length` bounds the prompt with each of its answers. `truncation`: "error" refuses what is longer,
    "drop" leaves it out, "right" cuts answers at their end, "left" cuts the prompt at its start. A row whose
    prompt (right) or answer (left) alone fills `max_length` is a bad row. `margin_from_scores` as in
    `preferences.parse_comparison`.

    Raises DataError for files and rows, ModelError for the tokenizer and its template.
    """
    return _prepare(
        wanted,
        tuple(preferences.COMPARISONS),
        partial(preferences.parse_comparison, margin_from_scores=margin_from_scores),
        {"kind": "comparisons", "margin_from_scores": margin_from_scores},
        tokenizer=tokenizer,
        chat_template=chat_template,
        max_length=max_length,
        truncation=truncation,
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
        workers=workers,
        vocab_size=vocab_size,
        progress=progress,
    )


def prepare_labelled(
    wanted: Sequence[Source],
    *,
    tokenizer: Any,
    chat_template: str | None = None,
    max_length: int,
    truncation: str = "error",
    on_bad_row: str = "error",
    cache_dir: str | Path,
    workers: int | None = 1,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> list[AnswerTable]:
    """One table of single answers, liked or not, per source; settings as in `prepare_comparisons`."""
    return _prepare(
        wanted,
        preferences.LABELLED,
        preferences.parse_labelled,
        {"kind": "labelled"},
        tokenizer=tokenizer,
        chat_template=chat_template,
        max_length=max_length,
        truncation=truncation,
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
        workers=workers,
        vocab_size=vocab_size,
        progress=progress,
    )


def _prepare(
    wanted: Sequence[Source],
    formats: Collection[str],
    parse: Callable[..., Judged],
    kind: dict[str, Any],
    *,
    tokenizer: Any,
    chat_template: str | None,
    max_length: int,
    truncation: str,
    vocab_size: int | None,
    **others: Any,
) -> list[AnswerTable]:
    template = templates.resolve(tokenizer, chat_template)
    encoder = Encoder(
        tokenizer,
        template,
        max_length=UNLIMITED,
        truncation="error",
        train_on="assistant",
        vocab_size=vocab_size,
    )
    identity = {
        **kind,
        "tokenizer": tokenise.tokenizer_identity(tokenizer),
        "template": template,
        "max_length": max_length,
        "truncation": truncation,
        "vocab_size": vocab_size,
    }
    reader = AnswerReader(encoder, formats, parse, max_length=max_length, truncation=truncation)
    found = tokenise.prepare(wanted, reader, identity=identity, **others)
    return [AnswerTable.of(cached) for cached in found]


@dataclass(frozen=True)
class EncodedAnswers:
    """One example, tokenised."""

    prompt: np.ndarray  # [p] int32
    ids: list[np.ndarray]  # K times [a] int32
    trained: list[np.ndarray]  # K times [a] bool
    judged: Judged
    truncated: bool

    def columns(self) -> dict[str, Any]:
        """What a table keeps of it."""
        learnt = [int(mask.sum()) for mask in self.trained]
        sizes = [len(ids) for ids in self.ids]
        pairs = self.judged.pairs
        return {
            "tokens": np.concatenate([self.prompt, *self.ids]),
            "trained": np.concatenate([np.zeros(len(self.prompt), dtype=bool), *self.trained]),
            "lengths": [len(self.prompt) + sum(sizes)],
            "counts": [sum(learnt)],
            "prompts": [len(self.prompt)],
            "answers": [len(sizes)],
            "sizes": sizes,
            "learnt": learnt,
            "pairs": [len(pairs)],
            "better": np.array([pair.better for pair in pairs], dtype=np.int32),
            "worse": np.array([pair.worse for pair in pairs], dtype=np.int32),
            "margins": np.array([pair.margin for pair in pairs], dtype=np.float32),
            "desirable": [self.judged.desirable],
        }


class AnswerReader:
    """Reads rows that judge answers. Its encoder must not truncate."""

    arrays = ARRAYS

    def __init__(
        self,
        encoder: Encoder,
        formats: Collection[str],
        parse: Callable[..., Judged],
        *,
        max_length: int,
        truncation: str,
    ) -> None:
        self.encoder = encoder
        self.formats = formats
        self.parse = parse
        self.max_length = max_length
        self.truncation = truncation

    def read(self, values: Sequence[Any], format: str) -> list[EncodedAnswers | RowError]:
        """An example or a refusal for each row, in order."""
        return tables.through(values, partial(self.parse, format=format), self._encode)

    def _encode(self, rows: list[Judged]) -> list[EncodedAnswers | RowError]:
        encoded = iter(self.encoder.encode([record for row in rows for record in row.answers]))
        answers: list[EncodedAnswers | RowError] = []
        for row in rows:
            wholes = [next(encoded) for _ in row.answers]
            try:
                answers.append(self._join(row, wholes))
            except RowError as error:
                answers.append(error)
        return answers

    def _join(self, judged: Judged, wholes: Sequence[Encoded | RowError]) -> EncodedAnswers:
        """Cut what the answers share from them."""
        rows = []
        for whole in wholes:
            if isinstance(whole, RowError):
                raise whole
            rows.append((whole.input_ids, whole.trained.copy()))
        first = rows[0][0]
        common = min((_shared(first, ids) for ids, _ in rows[1:]), default=len(first))
        if judged.answers[0].text is not None and judged.answers[0].trained_from == 0:
            for _, trained in rows:  # whole texts: the prompt is what their tokens share
                trained[:common] = False
        rows = [_without_tail(ids, trained) for ids, trained in rows]
        p = min(common, *(int(trained.argmax()) for _, trained in rows))
        truncated = p + max(len(ids) - p for ids, _ in rows) > self.max_length
        prompt, rows = first[:p], [(ids[p:], trained[p:]) for ids, trained in rows]
        if truncated:
            prompt, rows = self._truncate(prompt, rows)
        return EncodedAnswers(
            prompt, [ids for ids, _ in rows], [trained for _, trained in rows], judged, truncated
        )

    def _truncate(
        self, prompt: np.ndarray, answers: list[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Never so that nothing of the prompt or of an answer is left."""
        most, longest = self.max_length, max(len(ids) for ids, _ in answers)
        if self.truncation in ("error", "drop"):
            raise RowError(
                "over-long",
                f"{len(prompt)} tokens of prompt and {longest} of the longest answer, more than "
                f"data.max_length={most}; raise it, or pass data.truncation=right (cuts answers at their "
                "end), left (cuts the prompt at its start) or drop",
            )
        if self.truncation == "left":
            if longest >= most:
                raise RowError("answer fills max_length", f"an answer of {longest} tokens {_no_room(most)}")
            return prompt[longest - most :], answers
        if len(prompt) >= most:
            raise RowError("prompt fills max_length", f"a prompt of {len(prompt)} tokens {_no_room(most)}")
        return prompt, [_without_tail(*(part[: most - len(prompt)] for part in pair)) for pair in answers]


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the longest common prefix."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(one[:most] != other[:most])
    return int(differ[0]) if len(differ) else most


def _no_room(most: int) -> str:
    return f"alone fills data.max_length={most}; raise it"


def _without_tail(ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Up to the last trained token."""
    if not trained.any():
        raise RowError("no trained token", "no token to train on in one of the answers")
    stop = int(np.flatnonzero(trained)[-1]) + 1
    return ids[:stop], trained[:stop]
