"""The processes of one job: who this one is among them, and how they speak to one another.

Flow: `recipes` open a job with `join`; `train` and `checkpoint` take the `Ranks`. Tensors of the
model go over the device's own process group (NCCL, gloo); what the host says goes over a second,
gloo, so that it never waits for a device. A process alone is a job of one rank and needs neither.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from summerlm.core.errors import SummerError
from summerlm.core.runtime import InterruptedWaitError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its job.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        local_rank: Its number among those of this machine.
        host_group: The process group of the host's messages; None for a rank alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    host_group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes records and speaks to people."""
        return self.rank == 0

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
        failures = [other for other in self.exchange(error) if other is not None]
        if failures:
            first = min(failures, key=lambda other: isinstance(other, InterruptedWaitError))
            raise error if type(error) is type(first) else first
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


def _nothing() -> None:
    pass


@contextmanager
def join(device_type: str, timeout_s: float) -> Iterator[Ranks]:
    """Join the job that a launcher started this process for.

    Args:
        device_type: "cuda" or "cpu": whose memory the ranks exchange tensors from.
        timeout_s: Seconds after which a rank that doesn't answer is given up.

    Yields:
        This process among the ranks; `ALONE` where no launcher has set WORLD_SIZE above 1.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout)
    try:
        host_group = dist.new_group(backend="gloo", timeout=timeout)
        yield Ranks(dist.get_rank(), dist.get_world_size(), local_rank, host_group)
    finally:
        dist.destroy_process_group()
