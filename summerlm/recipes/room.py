"""Whether a run's step fits: the memory of one device, whichever device it is planned for.

Flow: `planning` asks a `Room` for the `Footprint` of a micro-batch and for the largest that fits;
both come of `tracing`, dealt over the devices by `plan.memory`.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from summerlm.core.errors import UsageError
from summerlm.core.hardware import Accelerator, device_type, find_accelerator
from summerlm.plan.cost import FAILURE_HOURS, USABLE
from summerlm.plan.memory import Footprint, share_out, spread
from summerlm.recipes.settings import Settings, derive
from summerlm.recipes.tracing import trace_step
from summerlm.train.config import compute_dtype

BYTES_PER_TOKEN = 4.0  # UTF-8 bytes of English text to a token of Mistral v3; code has about 3
RECOMPUTE = (None, "selective", "full")  # from the fastest to the one that needs least memory


@dataclass(frozen=True)
class Terms:
    """What a plan is made for.

    Attributes:
        hardware: Name in the table of accelerators; None = the device of the settings, here.
        count: How many of them.
        mfu: Share of their dense bf16 peak that is reached, from 0 to 1.
        price: Dollars a device-hour; None = the table's, where it has one.
        mtbf_hours: Mean hours between two failures of one device.
        bytes_per_token: UTF-8 bytes of text to a token.
    """

    hardware: str | None = None
    count: int = 8
    mfu: float = 0.4
    price: float | None = None
    mtbf_hours: float = FAILURE_HOURS
    bytes_per_token: float = BYTES_PER_TOKEN

    def check(self) -> None:
        """Refuse what can't be.

        Raises:
            UsageError: If a figure makes no sense or the hardware is unknown.
        """
        if not 0 < self.mfu <= 1:
            raise UsageError(f"--mfu {self.mfu:g}: should be above 0 and at most 1")
        for name in ("price", "mtbf_hours", "bytes_per_token"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} {value:g}: should be above 0")
        self.find()

    def find(self) -> Accelerator | None:
        """Look the hardware up; None where none is named."""
        return None if self.hardware is None else find_accelerator(self.hardware)


class Room:
    """The memory of one device under a run's settings.

    Args:
        settings: The run's settings.
        terms: What it is planned for.

    Raises:
        UsageError: If `parallel.shard_ranks` doesn't divide the devices.

    Attributes:
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
        self._world = 1 if row is None else terms.count
        self._shards = 1 if row is None else settings.parallel.shards(self._world)
        self.own = max(1, derive(settings).rows // self._world)
        self.checkpoint_bytes = 0
        self.limit = None if row is None else int(row.memory_bytes * USABLE)

    def footprint(self, rows: int, recompute: str | None = "as set") -> Footprint:
        """Give the memory of a step.

        Args:
            rows: Rows of a micro-batch.
            recompute: What is recomputed; None = nothing.

        Returns:
            Its highest moment on the fullest device.
        """
        settings = self._settings
        if recompute != "as set":
            parallel = settings.parallel.model_copy(update={"recompute": recompute})
            settings = settings.model_copy(update={"parallel": parallel})
        micro_batches = -(-self.own // rows)
        peaks = trace_step(settings, rows, micro_batches, self._dtype, gpu=self.gpu)
        self.checkpoint_bytes = peaks["state"]["weights"] + peaks["state"]["optimizer"]
        itemsize = 4 if self._dtype is None else self._dtype.itemsize
        return spread(peaks, share_out(settings.model, self._shards, itemsize, micro_batches))

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
