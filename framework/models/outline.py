"""A model described from its configuration alone: for planning, where no tokenizer and no weight is read."""

from __future__ import annotations

from framework.models import families, load, source
from framework.models.load import Description


def outline(
    path: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    init: str = "pretrained",
    head: str = "lm",
) -> Description:
    """As `load.inspect`, without a tokenizer and a fingerprint: enough to build the structure, not to train.

    `parameters` is 0: they are counted on the structure. Raises ModelError.
    """
    with load.quiet():
        found = source.find(path, revision=revision, gguf_file=gguf_file)
        config = source.configuration(found)
        families.check(config, head=head)
    if head == "score":
        config.num_labels = 1
    return Description(
        path=path,
        source=found,
        init=init,
        config=config,
        tokenizer=None,
        pad_id=0,
        parameters=0,
        fingerprint="",
        head=head,
    )
