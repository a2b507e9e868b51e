"""The tree of errors. Every message says what was found, what was expected and what to type.

    SapwoodError
    ├── UserError               the request cannot be carried out as written: exit status 2
    │   ├── ConfigError         a key, a value or a pair of values in the configuration
    │   ├── DataError           a row, a file or a source of data
    │   └── ModelError          a model directory, tokenizer, template or adapter
    └── CheckpointError         a checkpoint that is damaged, incomplete or of another run

`ValueError` and friends stay for misuse of our own functions; these are for people.
"""

from __future__ import annotations

DONE = 0  # exit status: the run finished
REFUSED = 2  # exit status: configuration or data refused before any weight was loaded
INTERRUPTED = 3  # exit status: stopped by a signal, with a checkpoint saved


class SapwoodError(Exception):
    """Base of every error that is raised on purpose and meant to be read by a person."""


class UserError(SapwoodError):
    """The request cannot be carried out as written. Ends the process with status 2."""


class ConfigError(UserError):
    """A key, a value or a combination of values in the configuration is refused."""


class DataError(UserError):
    """A row, a file or a source is refused.

    `path` and `line` (1-based), when known, lead the message in the form editors can jump to.
    """

    def __init__(self, message: str, *, path: object = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + message)
        self.path = path
        self.line = line


class ModelError(UserError):
    """A model directory, tokenizer, chat template or adapter is refused."""


class CheckpointError(SapwoodError):
    """A checkpoint is damaged, incomplete or belongs to another run."""
