"""Texts that are alike: the same but for case, spaces and punctuation, or sharing most of their pieces.

Counts characters, so it holds for every language, also for those that write no spaces. Letters: n
shingles of a text, H hash functions, R values of a band.
"""

from __future__ import annotations

import numpy as np

from framework.data.leaks import normalised

SHINGLE = 5  # characters
SHORT = (
    40  # shingles; in a shorter text a single letter is a difference, as in sums, and only equals are alike
)
ALIKE = 0.7  # shared shingles over all of two texts' (Jaccard) from which on one of them is enough
BANDS, R = 32, 4  # MinHash (Broder 1997): two texts at 0.7 share a band with probability 1 - (1 - 0.7^4)^32
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers mix all 64 bits


class Seen:
    """The texts kept so far."""

    def __init__(self) -> None:
        draw = np.random.Generator(np.random.Philox(0))
        top = np.iinfo(np.uint64).max
        self._factors = draw.integers(0, top, BANDS * R, dtype=np.uint64) | np.uint64(1)  # [H]
        self._terms = draw.integers(0, top, BANDS * R, dtype=np.uint64)
        self._texts: set[str] = set()
        self._shingles: list[np.ndarray] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}  # (band, its R values) -> texts

    def add(self, text: str) -> str | None:
        """Keep `text`; or say that it is a "duplicate" or "near duplicate" of one that is kept."""
        plain = normalised(text) or text  # what has neither letters nor digits counts as it stands
        if plain in self._texts:
            return "duplicate"
        shingles = shingles_of(plain)
        bands = self._bands_of(shingles) if len(shingles) >= SHORT else []
        near = {place for band in bands for place in self._bands.get(band, ())}
        if any(_jaccard(shingles, self._shingles[place]) >= ALIKE for place in near):
            return "near duplicate"
        self._texts.add(plain)
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._shingles))
        self._shingles.append(shingles)
        return None

    def _bands_of(self, shingles: np.ndarray) -> list[tuple[int, bytes]]:
        least = np.full(BANDS * R, np.iinfo(np.uint64).max)  # [H] the least hash of any shingle
        for start in range(0, len(shingles), 1024):
            hashed = shingles[start : start + 1024, None] * self._factors + self._terms  # modulo 2^64
            # The low bits of a product are not mixed; the least by its high bits.
            least = np.minimum(least, (hashed ^ (hashed >> np.uint64(32))).min(0))
        return [(band, least[band * R : (band + 1) * R].tobytes()) for band in range(BANDS)]


def shingles_of(text: str) -> np.ndarray:
    """[n] uint64, sorted: a number for each different run of `SHINGLE` characters."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    if len(letters) < SHINGLE:
        letters = np.pad(letters, (0, SHINGLE - len(letters)))
    windows = np.lib.stride_tricks.sliding_window_view(letters, SHINGLE)  # [_, SHINGLE]
    powers = np.cumprod(np.full(SHINGLE, _BASE))
    mixed = (windows * powers).sum(1, dtype=np.uint64)
    return np.unique((mixed ^ (mixed >> np.uint64(29))) * _BASE)


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
