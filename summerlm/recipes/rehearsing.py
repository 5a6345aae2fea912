"""Real steps of a run on made-up tokens, to learn what a step takes here.

Flow: `choosing` makes a few as a run begins, on every rank, to choose a micro-batch; `probing`
makes some in a process of its own for `plan --probe`.

Shapes: B rows, T positions, D width.
"""

import time

import torch

from summerlm.core.ranks import Ranks
from summerlm.data.batch import IGNORE, Batch
from summerlm.recipes.assembling import assemble, make_stepper
from summerlm.recipes.settings import Settings
from summerlm.train.step import Stepper

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
