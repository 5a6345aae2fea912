"""Which rows training never draws: by a hash of where a row lies, or by named files.

Flow: `sources` asks for a mask wherever it counts or reads rows. A row's fate depends on the
source's name, the file's name, the row's number and the fraction; never on the run's seed, on
lanes or on what else is read, so that every run measures on the same texts.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_KEY = b"summerlm held-out rows"


class HeldOut(Protocol):
    """A rule that holds rows out."""

    def mask(self, file: str, first: int, count: int) -> NDArray[np.bool_]:
        """Tell which of the file's rows first, first + 1, ... are held out, (count,)."""

    def describe(self) -> float | list[str]:
        """Give what the lock records of the rule: the fraction, or the files."""


class HeldOutRows:
    """Hold out rows by keyed hash; at least one where a fraction is asked and two rows are there.

    Args:
        source: The source's name.
        fraction: Expected share of the rows, 0 to 1.
        rows: Rows of each file, by the file's name.
    """

    def __init__(self, source: str, fraction: float, rows: Mapping[str, int]) -> None:
        self._source = source
        self._fraction = fraction
        self._limit = np.uint64(fraction * 2**64)  # a row below it is held out
        if fraction > 0 and sum(rows.values()) >= 2:
            lowest = min(self._hashes(file, 0, n).min() for file, n in rows.items() if n)
            self._limit = max(self._limit, lowest + np.uint64(1))

    def mask(self, file: str, first: int, count: int) -> NDArray[np.bool_]:  # noqa: D102
        return self._hashes(file, first, count) < self._limit

    def describe(self) -> float:  # noqa: D102
        return self._fraction

    def _hashes(self, file: str, first: int, count: int) -> NDArray[np.uint64]:
        """Hash rows: splitmix64 of the row's number, seeded by the file.

        Source:
            Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators",
            section 5, figures 16-17 (the variant with the constants known as splitmix64).
        """
        place = json.dumps([self._source, file]).encode()
        seed = int.from_bytes(hashlib.blake2b(place, digest_size=8, key=_KEY).digest(), "little")
        x = np.arange(first + 1, first + count + 1, dtype=np.uint64)
        x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class HeldOutFiles:
    """Hold out whole files.

    Args:
        files: Their names.
    """

    def __init__(self, files: frozenset[str]) -> None:
        self._files = files

    def mask(self, file: str, first: int, count: int) -> NDArray[np.bool_]:  # noqa: D102
        return np.full(count, file in self._files)

    def describe(self) -> list[str]:  # noqa: D102
        return sorted(self._files)
