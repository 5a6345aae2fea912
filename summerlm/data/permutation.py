"""Keyed permutations of any range, in constant memory: the order of units and of rows.

Flow: `lanes` asks for the unit or row at a position; since the order is a function of key and
position there is no shuffle buffer to save or to lose.
"""

import hashlib
import json

import numpy as np

ROUNDS = 6  # four are measurably uneven on ranges below 6
MIN_HALF_BITS = 3  # halves of 1 or 2 bits are too


def keyed_bits(*key: str | int, words: int = 1) -> np.ndarray:
    """Derive 64-bit words from a key, the same in every process and on every machine.

    Args:
        *key: Texts and integers that tell this use from all others.
        words: How many words, 1 to 8.

    Returns:
        The words, (words,), uint64.
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * words).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


class Permutation:
    """A permutation of range(size), chosen by a key among practically all of them.

    Args:
        size: Length of the range, at least 1.
        *key: Texts and integers that choose the permutation.

    Source:
        Luby and Rackoff 1988 (Feistel rounds make a permutation of any function);
        Black and Rogaway 2002 (walking the cycle down to a smaller range).

    Example:
        >>> Permutation(5, "seed", 1)(np.arange(5)).tolist()
        [3, 2, 1, 0, 4]
    """

    def __init__(self, size: int, *key: str | int) -> None:
        assert size >= 1
        self.size = np.uint64(size)
        half = max(MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        self._keys = keyed_bits(*key, words=ROUNDS)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Give what stands at some positions.

        Args:
            positions: Positions in range(size), (n,), any integer dtype.

        Returns:
            The elements at these positions, (n,), int64.
        """
        elements = self._rounds(positions.astype(np.uint64))
        # the rounds permute a range up to four times as long (64 at least): walk on while outside
        while (outside := elements >= self.size).any():
            elements[outside] = self._rounds(elements[outside])
        return elements.astype(np.int64)

    def at(self, position: int) -> int:
        """Give what stands at one position."""
        return int(self(np.array([position]))[0])

    def _rounds(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_scramble(right ^ key) & self._mask)
        return (left << self._half) | right


def _scramble(x: np.ndarray) -> np.ndarray:
    """Mix 64 bits so that the low ones depend on all (splitmix64's finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # arrays wrap silently
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
