"""The loop of a run: a generator of completed steps, and nothing else.

Flow: `recipes` iterates over `train` and calls `hooks` with each `Event`; saving, validation,
samples and records all hang there, never in here.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from summerlm.core.errors import SummerError
from summerlm.core.runtime import InterruptedWaitError, StopRequest
from summerlm.data.batch import IGNORE, Batch
from summerlm.data.loader import Step, Steps
from summerlm.train.guards import SkipGuard
from summerlm.train.step import Stepper


@dataclass(frozen=True)
class Event:
    """One completed step, read from the device.

    Attributes:
        step: Its number, from 1.
        tokens: Targets trained on so far, this step's included.
        loss: Mean cross-entropy in nats.
        grad_norm: Gradient norm before clipping.
        rate: The schedule's factor that the step used.
        ok: Whether the update was made.
        source_loss: Mean cross-entropy by source, for the sources the step drew from.
        data_wait_s: Seconds the step waited for its batch.
        data: What the step trained on: hash, counts, and the data's state after it.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    rate: float
    ok: bool
    source_loss: Mapping[str, float]
    data_wait_s: float
    data: Step


def train(
    stepper: Stepper,
    loader: Steps,
    rate_at: Callable[[int], float],
    guard: SkipGuard,
    *,
    start_tokens: int,
    last_step: int,
    sources: list[str],
    device: torch.device,
    stop: StopRequest,
) -> Iterator[Event]:
    """Run steps until the last one; the caller may stop between two.

    The result of a step is read from the device only after the next batch lies ready, so that
    the device's queue is seldom empty.

    Args:
        stepper: Makes the steps.
        loader: Gives the batches, from the first step that is to be made.
        rate_at: The schedule: targets trained on when a step is done, to its rate factor.
        guard: Stops a run that has diverged.
        start_tokens: Targets trained on before the first step made here.
        last_step: Number of the run's last step.
        sources: Names of the sources, in the batches' order.
        device: Where the model is.
        stop: Ends a wait for data, however long it would be.

    Yields:
        Each step, when it is complete.

    Raises:
        DivergedError: If too many steps in a row were not finite.
        SummerError: What the loader met, after the last step for which there were data.
        InterruptedWaitError: If a request to stop came while no step's data were ready.
    """
    tokens = start_tokens
    batches = iter(loader)
    item, batch, wait = _fetch(batches, device, stop)
    while True:
        tokens += batch.targets.numel()
        rate = rate_at(tokens)
        count = int((item.batch.targets != IGNORE).sum())
        result = stepper(batch, item.number, rate, count=count)
        done, waited = item, wait
        error: SummerError | InterruptedWaitError | None = None
        if done.number < last_step:
            try:
                item, batch, wait = _fetch(batches, device, stop)
            except (SummerError, InterruptedWaitError) as failure:
                error = failure  # the step that is done comes first, so that it can be saved
        loss, norm, ok = torch.stack((result.loss, result.grad_norm, result.ok.float())).tolist()
        nats, counts = result.source_nats.tolist(), result.source_targets.tolist()
        guard.see(bool(ok))
        yield Event(
            step=done.number,
            tokens=tokens,
            loss=loss,
            grad_norm=norm,
            rate=rate,
            ok=bool(ok),
            source_loss={s: n / c for s, n, c in zip(sources, nats, counts, strict=True) if c},
            data_wait_s=waited,
            data=done,
        )
        guard.check(done.number)
        if error is not None:
            raise error
        if done.number >= last_step:
            return


def _fetch(
    batches: Iterator[Step], device: torch.device, stop: StopRequest
) -> tuple[Step, Batch, float]:
    start = time.monotonic()
    with stop.interrupting():
        item = next(batches)
    return item, item.batch.to(device), time.monotonic() - start
