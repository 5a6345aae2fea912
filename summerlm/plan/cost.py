"""Time, money and saves: what a run takes on given devices.

Flow: `recipes.planning` asks after FLOPs and memory are known.
"""

import math
from dataclasses import dataclass

# of one accelerator: 419 unexpected interruptions in 54 days of 16,384 GPUs
# (Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.4)
FAILURE_HOURS = 54 * 24 * 16_384 / 419
SAVE_BYTES_PER_S = 1e9  # of one device to storage that outlives it: an assumption, see the docs
USABLE = (
    0.92  # share of a GPU's memory for tensors: the rest is torch's context, kernels' workspace
)
# and what the allocator can't fill


@dataclass(frozen=True)
class Devices:
    """Devices that train, and how well they are used.

    Attributes:
        count: How many.
        flops: FLOP/s of each that training reaches.
        price: Dollars an hour of each; None where nobody said.
    """

    count: int
    flops: float
    price: float | None

    def days(self, flops: float) -> float:
        """Give the days that so many FLOPs take."""
        return flops / (self.count * self.flops) / 86_400

    def dollars(self, days: float) -> float | None:
        """Give what so many days cost; None without a price."""
        return None if self.price is None else days * 24 * self.count * self.price

    def flops_for(self, *, days: float | None = None, dollars: float | None = None) -> float:
        """Give the FLOPs that a budget buys.

        Args:
            days: The budget in days, or None.
            dollars: The budget in dollars, or None; needs a price.

        Returns:
            FLOPs of all devices together.
        """
        assert (days is None) != (dollars is None), "one budget"
        if dollars is not None:
            assert self.price, "dollars need a price"
            days = dollars / (24 * self.count * self.price)
        assert days is not None
        return days * 86_400 * self.count * self.flops


def save_interval_s(save_s: float, failure_s: float) -> float:
    """Give the seconds between two saves that lose least to saving and to failures together.

    Args:
        save_s: Seconds that a save takes from training.
        failure_s: Mean seconds between two failures of the job.

    Returns:
        Seconds of training between two saves.

    Source:
        Young 1974, doi:10.1145/361147.361115, the first-order optimum; Daly 2006,
        doi:10.1016/j.future.2004.11.016, where a save takes much less than the time between
        failures.

    Example:
        >>> save_interval_s(save_s=50, failure_s=10_000)
        1000.0
    """
    return math.sqrt(2 * save_s * failure_s)


def lost_share(save_s: float, interval_s: float, failure_s: float) -> float:
    """Estimate the share of a job's time that goes into saves and into work done twice.

    Args:
        save_s: Seconds that a save takes from training.
        interval_s: Seconds of training between two saves.
        failure_s: Mean seconds between two failures of the job.

    Returns:
        Saves plus half an interval for each failure.

    Example:
        >>> lost_share(save_s=50, interval_s=1000, failure_s=10_000)
        0.1
    """
    return save_s / interval_s + interval_s / 2 / failure_s
