"""Whether two models read and write the same tokens: references, reward models and teachers must.

Rows of an embedding that stand for no token may differ in number: families pad their vocabularies to
multiples of something, and by size.
"""

from __future__ import annotations

from framework.errors import ConfigError
from framework.models.load import Description


def same_words(ours: Description, theirs: Description, key: str) -> None:
    """Raises ConfigError where the model that `key` names has other tokens."""
    if ours.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        raise ConfigError(
            f"{key}: {theirs.path} has another vocabulary than model.path={ours.path}, whose tokens it would "
            f"have to read; set {key} to a model of the same family"
        )


def shared_rows(ours: Description, theirs: Description) -> int:
    """Token ids below this are in both models. The tokenizer's are: `models.load.inspect` sees to it."""
    return min(ours.vocab_size, theirs.vocab_size)


def check_teacher(student: Description, teacher: Description, top_k: int | None) -> None:
    """Raises ConfigError for a teacher of other tokens, and for more of them than there are."""
    same_words(student, teacher, "stage.teacher")
    rows = shared_rows(student, teacher)
    if top_k is not None and top_k > rows:
        raise ConfigError(
            f"stage.top_k={top_k}: both models know {rows} tokens; expected at most that; type "
            "stage.top_k=null for all of them"
        )
