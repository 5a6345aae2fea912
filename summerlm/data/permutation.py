"""Keyed permutations of any range, in constant memory: the order of units and of rows.

Flow: `lanes` asks for the unit or row at a position; since the order is a function of key and
position there is no shuffle buffer to save or to lose.
"""

import hashlib
import json
from math import isqrt

import numpy as np

ROUNDS = 12  # six are measurably uneven on ranges of 5 or 6
CARRY = np.uint64(1)  # bits given up so that adding to a row or column can't wrap


def keyed_bits(*key: str | int, words: int = 1) -> np.ndarray:
    """Derive 64-bit words from a key, the same in every process and on every machine.

    Args:
        *key: Texts and integers that tell this use from all others.
        words: How many words.

    Returns:
        The words, (words,), uint64.
    """
    digest = hashlib.shake_256(json.dumps(key).encode()).digest(8 * words)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


class Permutation:
    """A permutation of range(size), chosen by a key.

    A Feistel network permutes the cells of a table that the range just fills: it adds to the row
    a hash of the column, then to the column a hash of the row, and so on. A position that lands
    in a cell past the range goes through the network again, until it is inside.

    Args:
        size: Length of the range, at least 1.
        *key: Texts and integers that choose the permutation.

    Source:
        Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains (generalised Feistel,
        cycle walking).

    Example:
        >>> Permutation(5, "seed", 1)(np.arange(5)).tolist()
        [4, 1, 3, 2, 0]
    """

    def __init__(self, size: int, *key: str | int) -> None:
        assert size >= 1
        rows = isqrt(size - 1) + 1
        self._size, self._rows = np.uint64(size), np.uint64(rows)
        self._columns = np.uint64(-(-size // rows))
        self._keys = keyed_bits(*key, words=ROUNDS)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Give what stands at some positions.

        Args:
            positions: Positions in range(size), (n,), any integer dtype.

        Returns:
            The elements at these positions, (n,), int64.
        """
        elements = self._network(positions.astype(np.uint64))
        while (outside := elements >= self._size).any():
            elements[outside] = self._network(elements[outside])
        return elements.astype(np.int64)

    def _network(self, cells: np.ndarray) -> np.ndarray:
        row, column = np.divmod(cells, self._columns)
        for to_row, to_column in self._keys.reshape(-1, 2):
            row = (row + (_scramble(column ^ to_row) >> CARRY)) % self._rows
            column = (column + (_scramble(row ^ to_column) >> CARRY)) % self._columns
        return row * self._columns + column


def _scramble(x: np.ndarray) -> np.ndarray:
    """Mix 64 bits so that each depends on all (splitmix64's finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # arrays wrap silently
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
