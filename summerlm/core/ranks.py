"""The processes of one job: who this one is among them, and how they speak to one another.

Flow: `recipes` open a job with `join`; `train` and `checkpoint` take the `Ranks`. Tensors of the
model go over the device's own process group (NCCL, gloo); what the host says goes over a second,
gloo, so that it never waits for a device. A process alone is a job of one rank and needs neither.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from summerlm.core.errors import SummerError
from summerlm.core.liveness import Liveness
from summerlm.core.roster import meet
from summerlm.core.runtime import InterruptedWaitError, die_with_launcher

T = TypeVar("T")
Trouble = SummerError | InterruptedWaitError  # what ends a run in order, on all ranks together
ARRIVAL = timedelta(minutes=15)  # what the slowest machine may take to start its ranks


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its job.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        local_rank: Its number among those of this machine.
        host_group: The process group of the host's messages; None for a rank alone.
        liveness: What watches the job; None for a rank alone.
        timeout: Of process groups: longer than liveness takes to find who hangs.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    host_group: dist.ProcessGroup | None = None
    liveness: Liveness | None = None
    timeout: timedelta | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes records and speaks to people."""
        return self.rank == 0

    def phase(self, name: str, step: int) -> None:
        """Say what this rank does from now on, so that a rank that hangs can be named.

        Args:
            name: For instance "data", "exchange", "step", "save" or "evaluate"; all ranks go
                through the same phases in the same order, so that who is behind is known.
            step: The step's number.
        """
        if self.liveness is not None:
            self.liveness.enter(name, step)

    def moves(self) -> None:
        """Say that this rank goes on within its phase, in something longer than a phase may be."""
        if self.liveness is not None:
            self.liveness.move()

    def exchange(self, value: T) -> list[T]:
        """Tell all ranks a value, and learn theirs; every rank calls this at the same place.

        Args:
            value: What this rank has to say; plain values.

        Returns:
            The values of all ranks, by rank.
        """
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def agree(self, act: Callable[[], T]) -> T:
        """Do something on every rank, and go on only if all could.

        Args:
            act: What to do; may raise what a user can mend.

        Returns:
            What it returned here.

        Raises:
            SummerError: What it raised here, or else the first rank's that it raised on.
            InterruptedWaitError: If a signal ended a wait on some rank and none failed.
        """
        result, error = None, None
        try:
            result = act()
        except (SummerError, InterruptedWaitError) as failure:
            error = failure
        raise_first(self.exchange(error), error)
        return cast(T, result)

    def lead_first(self, act: Callable[[], T]) -> T:
        """Do something on the leading rank, and then, where that went well, on the others.

        Args:
            act: What to do, for instance what writes a file that others then read.

        Returns:
            What it returned here.
        """
        leaders = self.agree(act if self.leads else _nothing)
        others = self.agree(_nothing if self.leads else act)
        return cast(T, leaders if self.leads else others)

    def lead(self, act: Callable[[], T]) -> T:
        """Do something on the leading rank alone, and tell all.

        Args:
            act: What to do, for instance what changes a file; it returns plain values.

        Returns:
            What it returned there.
        """
        return cast(T, self.exchange(self.agree(act if self.leads else _nothing))[0])

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place; every rank calls this at the same place.

        Args:
            tensor: This rank's summand, on the device of the job, the same shape on all ranks.

        Returns:
            The tensor, which now holds the sum.
        """
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


ALONE = Ranks()


def raise_first(errors: Sequence[Trouble | None], own: Trouble | None) -> None:
    """Raise the same trouble on all ranks, if any has some: rather an error than a request to stop.

    Args:
        errors: What each rank met, by rank; None where all is well.
        own: What this rank met, which keeps its own words where it is of the same kind.

    Raises:
        SummerError: The first rank's error.
        InterruptedWaitError: If no rank has an error and a signal ended a wait on one.
    """
    troubles = [error for error in errors if error is not None]
    if troubles:
        first = min(troubles, key=lambda trouble: isinstance(trouble, InterruptedWaitError))
        raise own if own is not None and type(own) is type(first) else first


def _nothing() -> None:
    pass


@contextmanager
def join(
    device_type: str, timeout_s: float, data_allowance_s: float | None = None
) -> Iterator[Ranks]:
    """Join the job that a launcher started this process for.

    Args:
        device_type: "cuda" or "cpu": whose memory the ranks exchange tensors from.
        timeout_s: Seconds a rank may stay in one phase, or give no sign of life, before the job
            is ended.
        data_allowance_s: Seconds it may stay in the phase "data"; None is `timeout_s`.

    Yields:
        This process among the ranks; `ALONE` where no launcher has set WORLD_SIZE above 1.

    Raises:
        PeerLostError: If a rank doesn't come, or is lost and no rank has said why.
        SystemExit: In place of an error where another rank was the first to fail, with its code.
    """
    die_with_launcher()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    store, rank, world = next(dist.rendezvous("env://", timeout=ARRIVAL))
    start, peers = meet(store, rank, world, ARRIVAL.total_seconds())
    longest_s = max(timeout_s, data_allowance_s or timeout_s)
    timeout = timedelta(seconds=2 * longest_s + 60)  # liveness is to speak first
    liveness = Liveness(
        dist.PrefixStore(start, store.clone()),
        rank,
        peers,
        timeout_s=timeout_s,
        data_allowance_s=longest_s,
    )
    liveness.start()
    try:
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=dist.PrefixStore(f"{start}/group", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
        # ranks wait here while rank 0 opens data, which has no limit: liveness watches them
        host_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        dist.barrier(host_group)  # a rank that left now would break others' still opening
        yield Ranks(rank, world, local_rank, host_group, liveness, timeout)
    except BaseException as error:
        verdict = liveness.settle(error)
        if verdict is error:
            raise
        raise verdict from None
    liveness.leave()
    dist.destroy_process_group()
