"""What a step takes under this or that micro-batch: predicted, and tried on made-up tokens.

Flow: `choosing` asks a `Trial` as a run begins, on every rank; predictions are `tracing`'s, times
and the allocator's peaks those of a few real steps.

Shapes: B rows, T positions.
"""

import gc
import math
import time
from collections.abc import Sequence

import torch

from summerlm.core.hardware import peak_memory
from summerlm.core.ranks import Ranks
from summerlm.data.batch import IGNORE, Batch
from summerlm.plan.memory import share_out, spread
from summerlm.recipes.assembling import assemble, make_stepper
from summerlm.recipes.room import largest
from summerlm.recipes.settings import Settings
from summerlm.recipes.tracing import trace_step
from summerlm.train.step import Stepper

STEPS = 3  # of a trial; the first is not counted
TRIED_TOKENS = 16_384  # of a step that is timed: enough to tell sizes apart
DOCUMENT = 500  # mean length of a made-up document, in tokens


def first_stepper(
    settings: Settings, ranks: Ranks, device: torch.device, dtype: torch.dtype | None
) -> Stepper:
    """Make what makes the steps of a run, from its first weights; every rank calls this.

    Args:
        settings: The run's settings.
        ranks: This process among those that train.
        device: Where it trains.
        dtype: Autocast's dtype, or None for float32.

    Returns:
        The stepper; its micro-batches are those of the settings.
    """
    layout, optimizer = assemble(settings, ranks, device, dtype)
    return make_stepper(settings, layout, optimizer, dtype, len(settings.data.sources) or 1)


def make_up(settings: Settings, rows: int, device: torch.device) -> Batch:
    """Make a batch up.

    Args:
        settings: The run's settings.
        rows: Its rows, B.
        device: Where it is wanted.

    Returns:
        Random ids in documents of about 500 tokens, the same at every call.
    """
    draw = torch.Generator().manual_seed(0)
    shape = (rows, settings.model.context)
    ids = torch.randint(settings.model.vocabulary, shape, generator=draw)
    begins = torch.rand(shape, generator=draw) < 1 / DOCUMENT
    targets = ids.roll(-1, 1).masked_fill(begins.roll(-1, 1), IGNORE)
    return Batch(ids, targets, begins.cumsum(1), torch.zeros(rows, dtype=torch.int64)).to(device)


def time_step(stepper: Stepper, batch: Batch, number: int) -> float:
    """Make a step, and wait until it is done.

    Args:
        stepper: Makes it.
        batch: This rank's rows.
        number: The step's number, from 1.

    Returns:
        Seconds.
    """
    began = time.perf_counter()
    count = int((batch.targets != IGNORE).sum()) * stepper.layout.ranks.world
    result = stepper(batch, number, 1.0, count=count)
    result.update_norm.item()  # the last thing that a step makes
    return time.perf_counter() - began


class Trial:
    """Tries what a step takes under this or that micro-batch.

    Args:
        settings: The run's settings.
        ranks: This process among those that train; all try the same.
        device: Where this rank trains.
        dtype: Autocast's dtype, or None for float32.
    """

    def __init__(
        self, settings: Settings, ranks: Ranks, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self._settings, self._ranks = settings, ranks
        self._device, self._dtype = device, dtype
        self._factor: dict[str | None, float] = {}  # measured bytes to predicted, by recomputation

    def largest(self, own: int, recompute: str | None, limit: int) -> int:
        """Find the most rows that fit, in even micro-batches; 0 where none does."""
        if self.predict(1, own, recompute) > limit:
            return 0
        if self._device.type == "cuda":
            try:
                self._factor[recompute] = self._measure(own, recompute, limit)
            except torch.OutOfMemoryError:
                if self._ranks.world > 1:
                    raise  # the others wait for this rank in the middle of a step
                gc.collect()
                torch.cuda.empty_cache()
                return 0
        return largest(own, limit, lambda rows: self.predict(rows, own, recompute))

    def predict(self, rows: int, own: int, recompute: str | None) -> int:
        """Predict the most bytes that a step of this rank's rows takes."""
        micro_batches = math.ceil(own / rows)
        settings, gpu = with_choice(self._settings, rows, recompute), self._device.type == "cuda"
        peaks = trace_step(settings, rows, micro_batches, self._dtype, gpu=gpu)
        itemsize = 4 if self._dtype is None else self._dtype.itemsize
        shards = settings.parallel.shards(self._ranks.world)
        memory = spread(peaks, share_out(settings.model, shards, itemsize, micro_batches))
        total = int(memory.total * self._factor.get(recompute, 1.0))
        # a CPU's memory holds the copy for a checkpoint, too
        return total if gpu else total + memory.weights + memory.optimizer

    def _measure(self, own: int, recompute: str | None, limit: int) -> float:
        """Compare the allocator's peak with the prediction, at one row and two; all ranks agree.

        Two are left out where they are predicted not to fit.
        """
        factors = []
        for rows in {1, min(2, own)}:
            if rows > 1 and self.predict(rows, 2 * rows, recompute) > limit:
                continue
            torch.cuda.reset_peak_memory_stats(self._device)
            self._steps(rows, 2, recompute)
            factors.append(peak_memory(self._device) / self.predict(rows, 2 * rows, recompute))
        return max(max(self._ranks.exchange(max(factors))), 1.0)

    def seconds_per_row(self, rows: int, own: int, recompute: str | None) -> float:
        """Time steps of micro-batches of so many rows; the slowest rank's time counts."""
        tokens = rows * self._settings.model.context
        micro_batches = min(math.ceil(own / rows), max(1, TRIED_TOKENS // tokens))
        seconds = min(self._steps(rows, micro_batches, recompute)[1:])
        return max(self._ranks.exchange(seconds)) / (rows * micro_batches)

    def _steps(self, rows: int, micro_batches: int, recompute: str | None) -> Sequence[float]:
        settings = with_choice(self._settings, rows, recompute)
        stepper = first_stepper(settings, self._ranks, self._device, self._dtype)
        batch = make_up(settings, rows * micro_batches, self._device)
        seconds = [time_step(stepper, batch, number + 1) for number in range(STEPS)]
        del stepper, batch
        torch._dynamo.reset()  # the run compiles its blocks as if these had never been
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return seconds


def with_choice(settings: Settings, rows: int, recompute: str | None) -> Settings:
    """Give the settings with what was chosen in the place of "auto".

    Args:
        settings: The run's settings.
        rows: Rows of a micro-batch, B.
        recompute: What the backward pass computes anew.

    Returns:
        The settings.
    """
    changes = {"memory": None, "micro_batch_rows": rows, "recompute": recompute}
    parallel = settings.parallel.model_copy(update=changes)
    return settings.model_copy(update={"parallel": parallel})
