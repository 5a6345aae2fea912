"""The batches of a job: this rank's rows, and what all ranks say to one another before a step.

Flow: `loop` asks the `Feed` for the next step. Every rank makes its rows and then tells all others,
in one message of the host, how many targets they hold, whether a signal came or an error, how long
it took, and how its saving goes. So all ranks know the global count before the step, stop after the
same one, and learn within a step of what went wrong anywhere.
"""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from summerlm.core.errors import SummerError
from summerlm.core.ranks import Ranks, Trouble, raise_first
from summerlm.core.runtime import InterruptedWaitError, StopRequest
from summerlm.data.batch import IGNORE, Batch
from summerlm.data.ledger import Counts
from summerlm.data.loader import Step, Steps, hash_ranks

Mask = Callable[[Batch, int], Batch]  # what hides a step's quarantined rows from the loss


@dataclass(frozen=True)
class Fed:
    """The data of one step.

    Attributes:
        number: The step, from 1.
        batch: This rank's rows, on its device.
        targets: Targets of the whole batch, ignored ones included.
        count: Targets of the whole batch that count.
        sha: `batch_sha` of the whole batch; on ranks that don't lead, of this rank's rows.
        state: Where this rank's lanes stand after the step.
        source_counts: What each source gave to the whole batch.
        incidents: What went wrong on any rank and was mended.
        wait_s: Seconds that the slowest rank waited for its rows.
        slowest_rank: The rank that was busiest since the step before; None for a rank alone.
        slowest_excess_s: Seconds that it was busy beyond the median rank.
        reports: How each rank's saving goes, by rank.
    """

    number: int
    batch: Batch
    targets: int
    count: int
    sha: str
    state: dict[str, Any]
    source_counts: dict[str, Counts]
    incidents: list[dict[str, Any]]
    wait_s: float
    slowest_rank: int | None
    slowest_excess_s: float
    reports: list[Any]


@dataclass(frozen=True)
class Message:
    """What a rank tells all others before a step; the step is None where it has no rows."""

    step: int | None
    count: int
    source_counts: dict[str, Counts]
    incidents: list[dict[str, Any]]
    wait_s: float
    busy_s: float
    stop: signal.Signals | None
    error: Trouble | None
    report: Any


class Feed:
    """Gives one rank the steps of its job.

    Args:
        loader: Makes the rank's rows, from the first step that is to be made.
        ranks: This process among the ranks.
        device: Where the rows go.
        stop: Ends a wait for data, however long it would be; learns of a signal to any rank.
        mask: Hides quarantined rows.
        report: Says how this rank's saving goes.
    """

    def __init__(
        self,
        loader: Steps,
        ranks: Ranks,
        device: torch.device,
        stop: StopRequest,
        mask: Mask,
        report: Callable[[], Any],
    ) -> None:
        self._loader = loader
        self._batches: Iterator[Step] = iter(loader)
        self._ranks = ranks
        self._device = device
        self._stop = stop
        self._mask = mask
        self._report = report

    def next(self, number: int, busy_s: float) -> Fed:
        """Give the next step; every rank calls this at the same place.

        Args:
            number: The step that is due.
            busy_s: Seconds this rank was busy since the step before, waits for others left out.

        Returns:
            The step's data.

        Raises:
            SummerError: What any rank's loader met.
            InterruptedWaitError: If a request to stop came to any rank.
        """
        start = time.monotonic()
        self._ranks.phase("data", number)
        item, error = None, None
        try:
            with self._stop.interrupting():
                item = next(self._batches)
        except (SummerError, InterruptedWaitError) as failure:
            item, error = None, failure
        batch = self._mask(item.batch, number) if item else None
        wait = time.monotonic() - start
        self._ranks.phase("exchange", number)
        own = Message(
            step=item.number if item else None,
            count=int((batch.targets != IGNORE).sum()) if batch else 0,
            source_counts=item.source_counts if item else {},
            incidents=item.incidents if item else [],
            wait_s=wait,
            busy_s=busy_s + wait,
            stop=self._stop.received,
            error=error,
            report=self._report(),
        )
        messages = self._ranks.exchange(own)
        self._heed(messages, own)
        assert item is not None, "a rank without rows has an error"
        assert batch is not None
        self._compare(messages, number)
        busy = [message.busy_s for message in messages]
        slowest = max(range(len(busy)), key=busy.__getitem__)
        return Fed(
            number=item.number,
            batch=batch.to(self._device),
            targets=batch.targets.numel() * self._ranks.world,
            count=sum(message.count for message in messages),
            sha=self._hash(item),
            state=item.state,
            source_counts={
                name: sum((message.source_counts[name] for message in messages), Counts())
                for name in item.source_counts
            },
            incidents=[incident for message in messages for incident in message.incidents],
            wait_s=max(message.wait_s for message in messages),
            slowest_rank=slowest if self._ranks.world > 1 else None,
            slowest_excess_s=busy[slowest] - statistics.median(busy),
            reports=[message.report for message in messages],
        )

    def _heed(self, messages: list[Message], own: Message) -> None:
        """Stop where any rank has to, all for the same reason."""
        stops = [message.stop for message in messages if message.stop is not None]
        if stops and self._stop.received is None:
            self._stop.received = stops[0]
        raise_first([message.error for message in messages], own.error)
        if stops:
            raise InterruptedWaitError

    def _compare(self, messages: list[Message], number: int) -> None:
        """Find a rank that has lost or doubled a step before it spoils the others' weights."""
        steps = [message.step for message in messages]
        if any(step != number for step in steps):
            listed = ", ".join(f"rank {rank} at {step}" for rank, step in enumerate(steps))
            raise RuntimeError(f"ranks have lost step with one another at {number}: {listed}")

    def _hash(self, item: Step) -> str:
        """Hash the whole batch on the leading rank, which gets everyone's rows for it."""
        if self._ranks.world == 1:
            return item.sha
        documents = item.batch.documents.numpy().astype(np.int32)
        ids, borders = self._gather(item.ids), self._gather(documents)
        return hash_ranks(ids, borders, self._loader.lane_rows) if self._ranks.leads else item.sha

    def _gather(self, rows: np.ndarray) -> list[np.ndarray]:
        own = torch.from_numpy(rows)
        parts = [torch.empty_like(own) for _ in range(self._ranks.world)]
        dist.gather(own, parts if self._ranks.leads else None, group=self._ranks.host_group)
        return [part.numpy() for part in parts]
