"""How sure a figure of a text is: its documents drawn anew, with replacement, many times.

Flow: `protocols` gives sums by document and what a figure makes of their totals.

Tokens of a document are alike, so that drawing tokens would promise far too much; documents are
the least that can be taken for independent.

Shapes: U units (documents, or blocks where a protocol has none), S sums of each, R resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 1000
CELLS = 1 << 22  # draws counted at once: 32 MiB


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    Attributes:
        value: The figure over all units.
        error: Standard deviation over resamples; None for fewer than two units, or where the figure
            is infinite.
        low: Lower end of the interval that holds the middle 95 % of the resamples, or None.
        high: Its upper end, or None.
    """

    value: float
    error: float | None
    low: float | None
    high: float | None


def bootstrap(
    sums: Floats, figure: Callable[[Floats], Floats], *, seed: int, resamples: int = RESAMPLES
) -> Estimate:
    """Estimate a figure that is made of totals, such as a ratio of two sums.

    Args:
        sums: What each unit adds to each total, (U, S).
        figure: Makes (R, S) totals into (R,) figures.
        seed: Of the draws; the same seed draws the same units whatever the figure.
        resamples: How often U units are drawn, R.

    Returns:
        The figure with its standard error and 95 % interval.

    Source:
        Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 6 and 13 (percentile
        interval); lm-eval's `bootstrap_stderr` resamples documents in the same way.

    Example:
        >>> sums = np.array([[2.0, 4.0], [3.0, 6.0], [1.0, 2.0]])  # all of the same ratio
        >>> bootstrap(sums, lambda totals: totals[:, 0] / totals[:, 1], seed=0)
        Estimate(value=0.5, error=0.0, low=0.5, high=0.5)
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        value = float(figure(sums.sum(0, keepdims=True))[0])
        if len(sums) < 2 or not np.isfinite(value):
            return Estimate(value, None, None, None)
        found = figure(_resampled(sums, seed, resamples))
        found = found[np.isfinite(found)]  # a draw of empty documents alone has none
    low, high = np.quantile(found, [0.025, 0.975]).tolist()
    return Estimate(value, float(found.std(ddof=1)), low, high)


def _resampled(sums: Floats, seed: int, resamples: int) -> Floats:
    """Give the totals of each resample, (R, S)."""
    U = len(sums)
    draw = np.random.default_rng(seed)
    at_once = max(1, CELLS // U)
    totals = []
    for start in range(0, resamples, at_once):
        times = draw.multinomial(U, np.full(U, 1 / U), size=min(at_once, resamples - start))
        totals.append(times @ sums)  # (R, U) @ (U, S)
    return np.concatenate(totals)
