"""Which source fills which row: shares of tokens kept at every moment and in every lane.

Flow: `lanes` asks for the source of a lane's n-th row; nothing is drawn and nothing is stored.

A lane's rows turn round a circle of circumference 1 by a fixed angle, the lanes start evenly
spread over it, and the sources own arcs as long as their weights:

    u = n a + (g l mod L) / L + seed  (mod 1),   a = (k + 0.618...) / L

After each step the L points lie 1/L apart, so the steps together turn by the golden angle
divided by L, and the whole batch is as even as can be. `k` decides how even a single lane is,
`g` how even a step's first rows are; both are chosen by their continued fractions.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import accumulate
from math import gcd

from summerlm.core.errors import UsageError
from summerlm.data.permutation import keyed_bits

TURN = 1 << 64  # the circle in 64-bit integers
GOLDEN = 0x9E3779B97F4A7C15  # its golden section
RUN = 16_000  # rows over which a lane is to be even
UNEVEN = 40  # sum of terms from which a lane strays by 8 rows; of L up to 4096 only 7 has no less


class Mixture:
    """The sources' shares, as a function from (lane, row) to source.

    Args:
        weights: One positive weight a source; only their ratios count.
        lanes: Number of lanes L.
        seed: Turns the circle.

    Example:
        >>> mixture = Mixture([3.0, 1.0], lanes=1, seed=0)
        >>> sources = [mixture.source(0, row) for row in range(100)]
        >>> sources[:8], sources.count(0)
        ([0, 0, 0, 0, 1, 0, 0, 0], 76)
    """

    def __init__(self, weights: Sequence[float], lanes: int, seed: int) -> None:
        exact = [Fraction(weight) for weight in weights]  # floats differ in the last bit by order
        self._ends = [int(end * TURN / sum(exact)) for end in accumulate(exact)]
        self._lanes = lanes
        self._k, self._g = rotation(lanes)
        self._angle = ((self._k << 64) + GOLDEN) // lanes
        self._start = int(keyed_bits("mixture", seed)[0])

    def source(self, lane: int, row: int) -> int:
        """Tell which source fills a row.

        Args:
            lane: Lane l.
            row: How many rows the lane dealt before.

        Returns:
            Index of the source.
        """
        spread = (self._g * lane % self._lanes << 64) // self._lanes
        return bisect_right(self._ends, (row * self._angle + spread + self._start) % TURN)


@cache
def rotation(lanes: int) -> tuple[int, int]:
    """Choose how fast a lane turns and how the lanes are spread.

    Points that turn by an angle stay even if no coarse fraction comes near it: if the terms of
    its continued fraction are small. Among the numbers coprime to L (others would let lanes
    coincide) those of the smallest sum are taken, nearest the golden section on a tie.

    Args:
        lanes: Number of lanes L.

    Returns:
        `k` and `g` of the module's formula.

    Raises:
        UsageError: If every choice lets single lanes stray from their shares.

    Source:
        Kuipers and Niederreiter 1974, Uniform Distribution of Sequences, chapter 2, theorem 3.4.
    """
    golden = lanes * GOLDEN / TURN
    coprime = [c for c in range(1, lanes + 1) if gcd(c, lanes) == 1]
    coprime.sort(key=lambda c: abs(c - golden))

    def turning(k: int) -> int:
        return sum(_continued_fraction((k << 64) + GOLDEN, lanes << 64))

    k = min(coprime, key=turning)
    if turning(k) >= UNEVEN:
        raise UsageError(f"data.lanes = {lanes} can't be dealt evenly; take {lanes + 1} or others")
    return k, min(coprime, key=lambda g: sum(_continued_fraction(g, lanes)))


def _continued_fraction(numerator: int, denominator: int) -> Iterator[int]:
    """Yield the terms after the whole part, up to the first convergent finer than 1 / RUN."""
    before, fineness = 0, 1
    numerator %= denominator
    while numerator and fineness <= RUN:
        term, rest = divmod(denominator, numerator)
        numerator, denominator = rest, numerator
        before, fineness = fineness, term * fineness + before
        yield term
