"""Which rows of a source measure and which may be learnt from: no text is in both.

The choice hangs on what the rows say alone, so it stays when their order changes or more of them come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from framework.data.leaks import normalised


def split(texts: Sequence[str], count: int, *, without: Collection[str] = ()) -> tuple[list[int], list[int]]:
    """Places of at most `count` texts to measure on, and of those that are left to learn from.

    Texts are compared `leaks.normalised`, as those in `without` are, of which none measures. Of several that
    are the same one measures, and none of them is left.
    """
    plain = [normalised(text) or text for text in texts]
    places = {text: place for place, text in reversed(list(enumerate(plain)))}  # the first of each
    free = sorted((text for text in places if text not in without), key=_mark)
    chosen = set(free[:count])
    return sorted(places[text] for text in chosen), [i for i, text in enumerate(plain) if text not in chosen]


def _mark(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
