"""Whether a run's step fits: the memory of one device, whichever device it is planned for.

Flow: `planning` asks a `Room` for the `Footprint` of a micro-batch and for the largest that fits;
both come of `tracing`, dealt over the devices by `plan.memory`.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from summerlm.core.hardware import device_type
from summerlm.plan.cost import USABLE
from summerlm.plan.memory import Footprint, Peaks, share_out, spread
from summerlm.recipes.settings import Settings, derive
from summerlm.recipes.terms import Terms
from summerlm.recipes.tracing import trace_step
from summerlm.train.config import compute_dtype

RECOMPUTE = (None, "selective", "full")  # from the fastest to the one that needs least memory


class Room:
    """The memory of one device under a run's settings.

    Args:
        settings: The run's settings.
        terms: What it is planned for.

    Raises:
        UsageError: If `parallel.shard_ranks` doesn't divide the devices.

    Attributes:
        world: Devices that train.
        shards: Devices that share a copy of the model.
        lanes: Of the data: what the number of devices must divide.
        own: Rows of a step on one device.
        limit: Bytes that tensors may use; None where no hardware is named.
        checkpoint_bytes: Of weights and optimizer state of a whole model; 0 before a `footprint`.
    """

    def __init__(self, settings: Settings, terms: Terms) -> None:
        self._settings = settings
        row = terms.find()
        self.gpu = row is not None or device_type(settings.run.device) == "cuda"
        if row is not None:
            precise = settings.train.precision == "float32"
            self._dtype = None if precise else torch.bfloat16
        else:
            device = torch.device("cuda" if self.gpu else "cpu")
            self._dtype = compute_dtype(settings.train, device)
        self.world = terms.world
        self.shards = 1 if row is None else settings.parallel.shards(self.world)
        self.lanes = settings.data.lanes
        self._rows = derive(settings).rows
        self.own = max(1, self._rows // self.world)
        self._traced: dict[tuple[int, int, str | None], Peaks] = {}
        self.checkpoint_bytes = 0
        self.limit = None if row is None else int(row.memory_bytes * USABLE)

    def footprint(self, rows: int, recompute: str | None) -> Footprint:
        """Give the memory of a step.

        Args:
            rows: Rows of a micro-batch.
            recompute: What is recomputed; None = nothing.

        Returns:
            Its highest moment on the fullest device.
        """
        return self._dealt(rows, recompute, self.own, self.shards)

    def fewest(self) -> int | None:
        """Find the fewest devices that hold a row if they share the model and recompute all of it.

        Returns:
            How many, from those planned for on, of the numbers that divide the data's lanes; None
            where none of them does.
        """
        for world in range(self.world, min(self.lanes, self._rows) + 1):
            if self.limit is None or self.lanes % world:
                continue
            if self._dealt(1, "full", self._rows // world, world).total <= self.limit:
                return world
        return None

    def _dealt(self, rows: int, recompute: str | None, own: int, shards: int) -> Footprint:
        """Give the memory of a step of `own` rows on one of the devices that share a model."""
        micro_batches = -(-own // rows)
        peaks = self._trace(rows, min(micro_batches, 2), recompute)  # more need no more
        itemsize = 4 if self._dtype is None else self._dtype.itemsize
        sharing = share_out(self._settings.model, shards, itemsize, micro_batches)
        return spread(peaks, sharing)

    def _trace(self, rows: int, micro_batches: int, recompute: str | None) -> Peaks:
        """Trace a step, once."""
        key = (rows, micro_batches, recompute)
        if key not in self._traced:
            parallel = self._settings.parallel.model_copy(update={"recompute": recompute})
            settings = self._settings.model_copy(update={"parallel": parallel})
            peaks = trace_step(settings, rows, micro_batches, self._dtype, gpu=self.gpu)
            self.checkpoint_bytes = peaks["state"]["weights"] + peaks["state"]["optimizer"]
            self._traced[key] = peaks
        return self._traced[key]

    def largest(self, limit: int) -> dict[str, Any]:
        """Find the largest micro-batch that some memory holds.

        Args:
            limit: Bytes.

        Returns:
            Its rows, and what has to be recomputed for it: what the settings say, or the least
            under which a row fits; rows are 0 where none does.
        """
        wish = self._settings.parallel.recompute
        for recompute in RECOMPUTE[RECOMPUTE.index(wish) :]:
            need = partial(self._total, recompute=recompute)
            rows = largest(self.own, limit, need)
            if rows:
                break
        return {
            "micro_batch_rows": rows,
            "recompute": recompute,
            "limit_bytes": limit,
        }

    def _total(self, rows: int, recompute: str | None) -> int:
        return self.footprint(rows, recompute).total


def largest(own: int, limit: int, need: Callable[[int], int]) -> int:
    """Find the largest micro-batch that fits, among those that cut a step's rows evenly.

    Args:
        own: Rows of a step on one device.
        limit: Bytes.
        need: The bytes that a micro-batch of so many rows needs; more rows need more, but for all
            of them at once, which need no sum of gradients.

    Returns:
        Its rows; 0 where not even one row fits.

    Example:
        >>> [largest(12, limit, lambda rows: 10 * rows) for limit in (9, 10, 55, 1000)]
        [0, 1, 4, 12]
    """
    sizes = sorted({math.ceil(own / count) for count in range(1, own + 1)})
    if need(sizes.pop()) <= limit:
        return own
    fitting = bisect_right(sizes, limit, key=need)
    return sizes[fitting - 1] if fitting else 0
