"""The loop of a run: a generator of completed steps, and nothing else.

Flow: `recipes` iterates over `train` and calls `hooks` with each `Event`; saving, validation,
samples and records all hang there, never in here.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from summerlm.core.errors import SummerError
from summerlm.core.marks import part
from summerlm.core.ranks import Ranks
from summerlm.core.runtime import InterruptedWaitError, StopRequest
from summerlm.train.feed import Fed, Feed
from summerlm.train.garbage import collects_between
from summerlm.train.guards import Guard, Verdict
from summerlm.train.step import Limits, Stepper, StepResult


@dataclass(frozen=True)
class Event:
    """One completed step, read from the device; the same on all ranks but for `data` and `result`.

    Attributes:
        step: Its number, from 1.
        tokens: Targets trained on so far, this step's included.
        loss: Mean cross-entropy in nats.
        grad_norm: Gradient norm before clipping.
        update_norm: Norm of the weights' change.
        rate: The schedule's factor that the step used.
        verdict: What the guard says of it; only a fine step changed anything.
        limits: How far loss and gradient norm might go.
        source_loss: Mean cross-entropy by source, for the sources the step drew from.
        data: What the step trained on: hash, counts, and the data's state after it.
        result: What the step left on the device.
        stop: The signal that asks the job to stop after this step.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    update_norm: float
    rate: float
    verdict: Verdict
    limits: Limits
    source_loss: Mapping[str, float]
    data: Fed
    result: StepResult
    stop: signal.Signals | None


@dataclass(frozen=True)
class Stretch:
    """The steps that are to be made.

    Attributes:
        done: Steps made before.
        tokens: Targets trained on before.
        last: Number of the run's last step.
    """

    done: int
    tokens: int
    last: int


@collects_between
def train(
    stepper: Stepper,
    feed: Feed,
    rate_at: Callable[[int], float],
    guard: Guard,
    *,
    stretch: Stretch,
    sources: list[str],
    ranks: Ranks,
    stop: StopRequest,
) -> Iterator[Event]:
    """Run steps until the last one; the caller may stop between two.

    The result of a step is read from the device only after the next batch lies ready, so that
    the device's queue is seldom empty.

    Args:
        stepper: Makes the steps.
        feed: Gives their data.
        rate_at: The schedule: targets trained on when a step is done, to its rate factor.
        guard: Judges each step, and stops a run that has diverged.
        stretch: Which steps.
        sources: Names of the sources, in the batches' order.
        ranks: This process among those that make the same steps.
        stop: A request to stop, to whichever rank it came.

    Yields:
        Each step, when it is complete.

    Raises:
        DivergedError: If too many steps in a row changed nothing, or a spike is to stop the run.
        SummerError: What any rank's loader met, after the last step for which there were data.
        InterruptedWaitError: If a request to stop came before any step was made.
    """
    tokens, number, hooks_s = stretch.tokens, stretch.done + 1, 0.0
    fed = feed.next(number, busy_s=0.0)
    while True:
        tokens += fed.targets
        rate, limits = rate_at(tokens), Limits(*guard.limits())
        ranks.phase("step", number)
        result = stepper(fed.batch, number, rate, count=fed.count, limits=limits)
        done, error = fed, None
        if number < stretch.last:
            try:
                with part("data"):
                    fed = feed.next(number + 1, busy_s=hooks_s + result.own_s)
            except (SummerError, InterruptedWaitError) as failure:
                error = failure  # the step that is done comes first, so that it can be saved
        ranks.phase("result", number)
        figures = (result.loss, result.grad_norm, result.update_norm, result.ok)
        loss, norm, update, ok = torch.stack([figure.double() for figure in figures]).tolist()
        nats, counts = result.source_nats.tolist(), result.source_targets.tolist()
        verdict = guard.see(number, loss, norm, bool(ok), count=done.count)
        ranks.phase("hooks", number)
        began = time.monotonic()
        yield Event(
            step=number,
            tokens=tokens,
            loss=loss,
            grad_norm=norm,
            update_norm=update,
            rate=rate,
            verdict=verdict,
            limits=limits,
            source_loss={s: n / c for s, n, c in zip(sources, nats, counts, strict=True) if c},
            data=done,
            result=result,
            stop=stop.received if isinstance(error, InterruptedWaitError) else None,
        )
        hooks_s = time.monotonic() - began
        guard.check(number)
        if error is not None:
            raise error
        if number >= stretch.last:
            return
        number += 1
