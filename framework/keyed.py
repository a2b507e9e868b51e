"""Keyed randomness: a seed is a pure function of what it is for, never of what was drawn before.

`key(seed, "dropout", step, micro, rank)` gives the same number on every machine and after every
resume, so a run's random state is its step number and nothing else.
"""

from __future__ import annotations

import hashlib


def key(seed: int, purpose: str, *where: int | str) -> int:
    """A 63-bit seed for one purpose at one place.

    `seed` is the run's seed, `purpose` a word such as "dropout" or "shuffle", `where` the indices
    (step, micro-batch, rank, ...) that tell one draw from another. Stable over Python versions
    and platforms (BLAKE2b of the joined text), unlike `hash`.
    """
    text = "/".join([str(int(seed)), purpose, *map(str, where)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
