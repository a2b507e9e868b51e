"""From sources to tables: rows in the form that the run's stage learns from, tokenised and cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from framework.config.stage import ONLINE, SUPERVISED
from framework.data import answers, prompts
from framework.data import tables as tokenised
from framework.data.mixture import Group, Mixture
from framework.data.prompts import PromptTable
from framework.data.sources import Source
from framework.data.tables import Table
from framework.data.tokenise import Progress
from framework.errors import ConfigError

if TYPE_CHECKING:
    from framework.config.build import Inspected


def read(inspected: Inspected, sources: Sequence[Any], *, progress: Progress | None = None) -> list[Any]:
    """Tables of some of the run's sources in the form that its stage learns from; cached."""
    stage = inspected.run.stage
    if stage.name in ONLINE:
        return questions(inspected, sources, progress=progress)
    if stage.name in SUPERVISED:
        return text(inspected, sources, progress=progress)
    given = [Source(**source.model_dump()) for source in sources]
    if inspected.unpaired:
        return answers.prepare_labelled(given, progress=progress, **options(inspected))
    return answers.prepare_comparisons(
        given,
        margin_from_scores=stage.margin_from_scores,  # type: ignore[union-attr]
        progress=progress,
        **options(inspected),
    )


def text(
    inspected: Inspected, sources: Sequence[Any], *, progress: Progress | None = None, **changes: Any
) -> list[Table]:
    """Tables of text to be learnt token by token. `changes` are of `options`."""
    given = [Source(**source.model_dump()) for source in sources]
    reading = {**options(inspected), "train_on": inspected.run.data.train_on, **changes}
    return tokenised.prepare(given, progress=progress, **reading)


def questions(
    inspected: Inspected, sources: Sequence[Any], *, progress: Progress | None = None
) -> list[PromptTable]:
    """Tables of what is to be answered. Raises ConfigError where answers leave no room for it."""
    reading = options(inspected)
    most = reading.pop("max_length") - inspected.run.rollout.max_new_tokens
    if most < 1:
        raise ConfigError(
            f"rollout.max_new_tokens={inspected.run.rollout.max_new_tokens} leaves no room for a prompt in "
            f"data.max_length={inspected.run.data.max_length}; type rollout.max_new_tokens="
            f"{inspected.run.data.max_length // 2}"
        )
    given = [Source(**source.model_dump()) for source in sources]
    online = inspected.run.stage.name in ONLINE
    if not online and reading["truncation"] not in ("error", "drop"):
        reading["truncation"] = "drop"  # the setting is about what is learnt, and a question is never cut
    return prompts.prepare(given, max_prompt_tokens=most, progress=progress, **reading)


def options(inspected: Inspected) -> dict[str, Any]:
    """How every table is read."""
    run, description = inspected.run, inspected.description
    return {
        "tokenizer": description.tokenizer,
        "chat_template": run.model.chat_template,
        "max_length": run.data.max_length,
        "truncation": run.data.truncation,
        "on_bad_row": run.data.on_bad_row,
        "cache_dir": run.data.cache_dir,
        "workers": run.data.workers,
        "vocab_size": description.vocab_size,
    }


def group(tables: Sequence[Table], share_of: str = "trained_tokens") -> Group:
    """What a mixture draws from; `share_of` is what replay's share is counted in, as in `replay.share_of`."""
    weights = [table.weight for table in tables]
    given = [weight for weight in weights if weight is not None]
    return Group([_SIZES[share_of](table) for table in tables], given or None)


_SIZES: Mapping[str, Callable[[Table], np.ndarray]] = {
    "trained_tokens": lambda table: table.trained,
    "tokens": lambda table: table.lengths,
    "rows": lambda table: np.ones(len(table), dtype=np.int32),
}


def apart(tables: Sequence[Table], *, seed: int) -> Mixture:
    """The stream of text that is a term of its own, beside what the stage learns from."""
    return Mixture(group(tables), None, fraction=0.0, seed=seed, shuffle=True)


def distinct(tables: Sequence[Table]) -> list[Table]:
    """The same tables with no name twice, since replay may come from a file named like one of data.train."""
    taken: set[str] = set()
    named = []
    for table in tables:
        name = table.name
        while name in taken:
            name += "-replay"
        taken.add(name)
        named.append(replace(table, name=name))
    return named
