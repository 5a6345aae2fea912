"""What watches a run's numbers: steps that are not finite, spikes, divergence.

Flow:
    1. before a step `loop` asks `Guard.limits` how far loss and gradient norm may go; the device
       makes no update beyond them, or where they are not finite;
    2. after the step `loop` tells `Guard.see` what it came to;
    3. when the step is on record, `Guard.check` stops a run that can't go on;
    4. `Guard.state` is part of the checkpoint, so that a resumed run judges as it would have.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from statistics import median
from typing import Any

from summerlm.core.errors import DivergedError
from summerlm.train.config import TrainConfig

WINDOW = 128  # accepted steps that deviations are made from
LEVEL = 32  # the last of them, from which deviations are counted; fewer say too little
DEVIATIONS = 6.0
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LOSS_FLOOR = 0.05  # nats: the least that counts as a deviation, so 0.3 above the level are borne
NORM_FLOOR = 0.4  # of its logarithm: 11 times the level is borne, for clipping tames such


class Verdict(StrEnum):
    """What a step came to."""

    FINE = "fine"
    NOT_FINITE = "not finite"
    SPIKE = "spike"
    EMPTY = "empty"  # all its rows are quarantined: there was nothing to learn


class Guard:
    """Judges the steps of a run by those before.

    Args:
        config: What is done about a spike, and how many steps in a row may be skipped.
        state: What `state` gave, for a resumed run.
    """

    def __init__(self, config: TrainConfig, state: Mapping[str, Any] | None = None) -> None:
        self._policy, self._max = config.on_spike, config.max_skipped_steps
        state = state or {"in_a_row": 0, "total": 0, "losses": (), "norms": ()}
        self.in_a_row: int = state["in_a_row"]
        self.total: int = state["total"]
        self._losses = deque[float](state["losses"], maxlen=WINDOW)
        self._norms = deque[float](state["norms"], maxlen=WINDOW)
        self._last = Verdict.FINE

    def limits(self) -> tuple[float, float]:
        """Say how far the next step may go.

        The limit is the level and six deviations above it: of the loss in nats, of the norm as a
        factor, for norms scatter by factors. Level is the median of the last 32 accepted steps, so
        that limits follow a loss that falls. A deviation is a median distance, which half of the
        steps may falsify before it breaks, where the mean and standard deviation of others' guards
        remember each spike until it leaves the window: the larger one of the last steps' distance
        from the level, which sees what comes in waves, and of that between any two steps in a row
        of the last 128, which forgets the trend. It has a floor, since a run so smooth that a
        few hundredths of a nat are six deviations is in no danger from them.

        Returns:
            The largest loss in nats and the largest gradient norm before clipping; infinite while
            too few steps were seen, or where spikes are left alone.

        Source:
            Chowdhery et al. 2022, arXiv:2204.02311, section 5.1 (spikes come of the weights' state
            and these batches together, and skipping the batches passes them); OLMo-core's
            SkipStepOptimizer and levanter's `skip_bad_steps` for 128 steps and six deviations.
        """
        if self._policy is None or len(self._losses) < LEVEL:
            return math.inf, math.inf
        logs = [math.log(norm) for norm in self._norms]
        return _limit(list(self._losses), LOSS_FLOOR), math.exp(_limit(logs, NORM_FLOOR))

    def see(self, step: int, loss: float, norm: float, ok: bool, *, count: int = 1) -> Verdict:
        """Take note of one step.

        Args:
            step: Its number.
            loss: Its mean loss in nats.
            norm: Its gradient norm before clipping.
            ok: Whether both were finite and within the limits, so that its update was made.
            count: How many targets counted; a step without any is no sign of anything.

        Returns:
            What it came to.
        """
        self._last = _judge(loss, norm, ok) if count else Verdict.EMPTY
        if not count:
            return self._last
        if ok:
            self._losses.append(loss)
            self._norms.append(max(norm, 1e-30))  # its logarithm is taken
        self.in_a_row = 0 if ok else self.in_a_row + 1
        self.total += not ok
        return self._last

    def check(self, step: int) -> None:
        """Stop a run that has diverged, after its last step is on record.

        Args:
            step: Number of the step seen last.

        Raises:
            DivergedError: If that step was a spike and spikes stop the run, or if too many steps
                in a row were skipped.
        """
        where = "lower optim.peak_lr, or look at incidents.jsonl for where it began"
        if self._last is Verdict.SPIKE and self._policy == "stop":
            loss, norm = self.limits()
            raise DivergedError(
                f"step {step}: a spike beyond a loss of {loss:.4g} or a gradient norm of "
                f"{norm:.4g}, and train.on_spike = 'stop'; {where}, or set train.on_spike to "
                "'skip' or 'rollback'"
            )
        if self.in_a_row > self._max:
            raise DivergedError(
                f"step {step}: loss or gradient not finite, or beyond their limits, for "
                f"{self.in_a_row} steps in a row; {where}"
            )

    def state(self) -> dict[str, Any]:
        """Give counts and window, for the checkpoint."""
        return {
            "in_a_row": self.in_a_row,
            "total": self.total,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }


def _judge(loss: float, norm: float, ok: bool) -> Verdict:
    if ok:
        return Verdict.FINE
    finite = math.isfinite(loss) and math.isfinite(norm)
    return Verdict.SPIKE if finite else Verdict.NOT_FINITE


def _limit(values: Sequence[float], floor: float) -> float:
    """Give the level and six deviations above it, each at least the floor."""
    recent = values[-LEVEL:]
    level = median(recent)
    around = median(abs(value - level) for value in recent)
    between = median(abs(b - a) for a, b in pairwise(values)) / math.sqrt(2)  # of two that vary
    return level + DEVIATIONS * max(MAD_TO_DEVIATION * max(around, between), floor)
