"""`plan --probe`: what a run's step really takes on this machine, and the plan corrected by it.

Flow: `planning` calls `probe`, which has `rehearsing` make real steps of the run's own
micro-batch, or of two smaller ones where that takes too long, and extends what they took to the
run's step.

Shapes: B rows of a micro-batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from summerlm.core.errors import DeviceMemoryError
from summerlm.core.hardware import device_type
from summerlm.plan.count import flops_per_token
from summerlm.recipes.rehearsing import Findings, has_text, in_child
from summerlm.recipes.settings import Settings, derive

STEPS = 20
MOST = 3  # micro-batches of a step that is made as it is; of one too long, steps of 1 and 3
# that a step, or else a micro-batch, takes at most at a speed that any device has: else smaller
# ones are made
LONGEST_S = 6.0
SLOW_FLOPS = {"cpu": 40e9, "cuda": 40e12}  # of a thread, of a GPU


@dataclass(frozen=True)
class Probed:
    """A run's step on this machine, as a few real ones tell it.

    Attributes:
        seconds: Of a step.
        peak_bytes: Of the process, or of the GPU's allocator.
        base_bytes: Of the process before it had a model; 0 on a GPU.
        tokens: Of a step.
        rows_tried: Micro-batches that were made, in rows.
        flops: FLOP/s.
        own_text: Whether they were made of the run's own text.
    """

    seconds: float
    peak_bytes: int
    base_bytes: int
    tokens: int
    rows_tried: tuple[int, ...]
    flops: float
    own_text: bool


def probe(settings: Settings, rows: int, predicted: Callable[[int], int]) -> Probed:
    """Make a run's steps here for a short while, and say what its own take.

    Args:
        settings: The run's settings.
        rows: Rows of its micro-batch, B.
        predicted: The bytes of tensors that a micro-batch of so many rows needs by `tracing`: what
            extends the peak from smaller micro-batches.

    Returns:
        What a step of the run takes.

    Raises:
        DeviceMemoryError: If memory doesn't last.
    """
    derived = derive(settings)
    micro_batches = derived.rows / rows  # the last one may have fewer rows
    tried = _rows_to_try(settings, rows)
    short = micro_batches <= MOST or derived.rows <= _longest(settings)
    whole = tried == [rows] and short
    kinds = [math.ceil(micro_batches)] if whole else [1, MOST]
    found = [_must(settings, size, kinds) for size in tried]

    first, last = found[0], found[-1]
    if whole:
        seconds = first.median(kinds[0])
    else:
        each = (first.median(MOST) - first.median(1)) / (MOST - 1)  # of a micro-batch
        seconds = first.median(1) - each + micro_batches * each * rows / tried[0]
    peak = float(first.peak_bytes)
    if len(found) > 1:
        seen = first.peak_bytes - last.peak_bytes
        expected = predicted(tried[0]) - predicted(tried[1])
        peak += (predicted(rows) - predicted(tried[0])) * (seen / expected if expected else 1.0)
    elif tried[0] < rows:
        peak += predicted(rows) - predicted(tried[0])
    tokens = settings.train.batch_tokens
    return Probed(
        seconds=seconds,
        peak_bytes=round(peak),
        base_bytes=first.base_bytes,
        tokens=tokens,
        rows_tried=tuple(tried),
        flops=tokens * flops_per_token(settings.model) / seconds,
        own_text=has_text(settings),
    )


def _rows_to_try(settings: Settings, rows: int) -> list[int]:
    """Decide which micro-batches are made: the run's own, or two smaller ones."""
    longest = _longest(settings)
    if device_type(settings.run.device) == "cuda" or rows <= longest:
        return [rows]
    return [longest, longest // 2] if longest > 1 else [longest]


def _longest(settings: Settings) -> int:
    """Give the rows that take `LONGEST_S` at a speed that any device has, at least one."""
    device = device_type(settings.run.device)
    speed = SLOW_FLOPS[device] * (torch.get_num_threads() if device == "cpu" else 1)
    row_flops = flops_per_token(settings.model) * settings.model.context
    return max(1, int(LONGEST_S * speed / row_flops))


def _must(settings: Settings, rows: int, kinds: Sequence[int]) -> Findings:
    found = in_child(settings, rows, kinds, STEPS)
    if found is None:
        raise DeviceMemoryError(
            f"--probe: a micro-batch of {rows} rows doesn't fit here; lower "
            "parallel.micro_batch_rows"
        )
    return found
