"""A 5-gram model over token ids: what counting alone predicts.

Flow: the demo's recipe fits `KneserNey` to the tokens that its model was trained on and compares
the two on held-out text.

Modified Kneser-Ney: the probability of a token is a discounted count after its longest context,
plus the mass of the discounts spread by the next shorter context, and so on down to the uniform
distribution. Counts below the highest order count *different tokens in front*, not occurrences.

N-grams are numbered: the n-gram that ends at a position has the key (number of the (n-1)-gram
that ends one position earlier) * base + token, and its number is the key's rank among all keys
of the training text. So keys fit into 64 bits for any order and vocabulary, the number of an
n-gram's context stands in its own key, and all work is sorting and counting of whole arrays.

Shapes: S positions of the stream (documents with padding in front of each), G n-grams of a level.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from summerlm.core.errors import UsageError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # KenLM's, where a text is too small to estimate them


@dataclass(frozen=True)
class Level:
    """What is known of the n-grams of one order.

    Attributes:
        keys: Key of each n-gram, (G,), ascending; its index is the n-gram's number.
        direct: Discounted share of each n-gram after its context, (G + 1,); last 0, for unknown.
        spread: What the context of each n-gram leaves to shorter ones, by the context's number;
            last 1, for an unknown context.
    """

    keys: Ints
    direct: Floats
    spread: Floats

    def numbers(self, keys: Ints) -> Ints:
        """Look up n-grams; -1 for those that were never seen."""
        found = np.searchsorted(self.keys, keys)
        found[found == len(self.keys)] = 0
        return np.where(self.keys[found] == keys, found, -1)


class KneserNey:
    """Interpolated n-gram model with modified Kneser-Ney discounts.

    Every document begins after padding, so that its first tokens have contexts of their own; the
    end of a document is not predicted.

    Args:
        order: Longest n-gram, at least 1.

    Source:
        Chen & Goodman 1998, TR-10-98, section 3 (modified Kneser-Ney, its discounts estimated from
        counts of counts). Where those of an order can't be estimated (a count of counts is 0, or
        a discount is not above 0) they are `FALLBACK_DISCOUNTS`, as in KenLM.

    Example:
        >>> model = KneserNey(order=2).fit([[0, 1, 0, 1, 0, 1]], vocabulary=3)
        >>> model.probabilities([0, 1, 2]).round(3).tolist()
        [0.75, 0.667, 0.083]
    """

    def __init__(self, order: int = 5) -> None:
        assert order >= 1, "a 1-gram model is the smallest"
        self.order = order

    def fit(self, sequences: Iterable[Sequence[int]], vocabulary: int) -> Self:
        """Count a training text.

        Args:
            sequences: Documents as ids, without BOS and EOS.
            vocabulary: How many ids there are; also those that never occur get a probability.

        Returns:
            The model itself.

        Raises:
            UsageError: If there is no token to count.
        """
        self.vocabulary = vocabulary
        stream = np.concatenate([self._padded(s) for s in sequences] or [self._padded([])])
        real = stream < vocabulary
        if not real.any():
            raise UsageError("an n-gram model needs at least one token to count")
        base = vocabulary + 1
        self._levels = []
        keys, numbers, _ = _number(np.zeros_like(stream), stream, base)
        for _ in range(1, self.order):
            longer_keys, longer, first = _number(numbers, stream, base)
            ends = first[real[first]]  # one end of each different n-gram that is one longer
            counts = np.bincount(numbers[ends], minlength=len(keys))
            self._levels.append(_level(keys, counts, base))
            keys, numbers = longer_keys, longer
        counts = np.bincount(numbers[real], minlength=len(keys))
        self._levels.append(_level(keys, counts, base))
        return self

    def probabilities(self, sequence: Sequence[int]) -> Floats:
        """Give the probability of each token of a document after those in front of it.

        Args:
            sequence: A document's ids.

        Returns:
            Probabilities, (tokens,), all above 0.
        """
        stream = self._padded(sequence)
        numbers = np.zeros_like(stream)  # of the n-gram that ends at each position, n = 0
        found = np.full(len(stream), 1 / self.vocabulary)
        for level in self._levels:
            contexts = np.roll(numbers, 1)
            numbers = level.numbers(contexts * (self.vocabulary + 1) + stream)
            found = level.direct[numbers] + level.spread[contexts] * found
        return found[self.order :]

    def nats(self, sequence: Sequence[int]) -> float:
        """Sum the cross-entropy of a document's tokens.

        Args:
            sequence: A document's ids.

        Returns:
            Nats; 0 for an empty document.
        """
        return float(-np.log(self.probabilities(sequence)).sum())

    def _padded(self, sequence: Sequence[int]) -> Ints:
        """Put padding, one id past the vocabulary, in front of a document."""
        ids = np.array([*[self.vocabulary] * self.order, *sequence], dtype=np.int64)
        assert ((ids[self.order :] >= 0) & (ids[self.order :] < self.vocabulary)).all()
        return ids


def _number(shorter: Ints, stream: Ints, base: int) -> tuple[Ints, Ints, Ints]:
    """Number the n-grams of a stream, given the numbers (S,) of its (n-1)-grams.

    The stream is taken as a ring: n-grams that reach over a border end in padding, and those are
    contexts at most and never counted.

    Args:
        shorter: Number of the (n-1)-gram that ends at each position, (S,); zeros for n = 1.
        stream: Ids and padding, (S,).
        base: One more than the largest id of the stream.

    Returns:
        The keys (G,), the number of the n-gram that ends at each position (S,), and the first
        position where each n-gram ends (G,).
    """
    keys, first, numbers = np.unique(
        np.roll(shorter, 1) * base + stream, return_index=True, return_inverse=True
    )
    return keys, numbers, first


def _level(keys: Ints, counts: Ints, base: int) -> Level:
    """Discount the counts of all n-grams of one order, (G,); 0 where one is only a context."""
    discounts = _discounts(counts)[np.minimum(counts, 3)]  # (G,)
    contexts = keys // base
    totals = np.bincount(contexts, counts)  # by the context's number
    mass = np.bincount(contexts, discounts)
    spread = np.divide(mass, totals, out=np.ones_like(mass), where=totals > 0)
    direct = (counts - discounts) / np.maximum(totals, 1)[contexts]
    return Level(keys, np.append(direct, 0.0), np.append(spread, 1.0))


def _discounts(counts: Ints) -> Floats:
    """Estimate what to take from a count of 0 (nothing), 1, 2 and at least 3, (4,)."""
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=5)[1:5].tolist()
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        estimated = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (estimated[1:] > 0).all():
            return estimated
    return np.array([0, *FALLBACK_DISCOUNTS])
