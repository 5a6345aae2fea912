"""A run's model and optimizer, as its settings ask for them, with their first weights.

Flow: `opening` fills what `assemble` makes from a checkpoint; `trying` makes steps of it;
`make_stepper` gives both what makes their steps.
"""

from collections.abc import Callable

import torch

from summerlm.core.ranks import Ranks
from summerlm.optim.build import OptimizerSet, build_optimizer
from summerlm.parallel.layout import Layout, lay_out
from summerlm.recipes.settings import Settings
from summerlm.train.step import Stepper


def assemble(
    settings: Settings, ranks: Ranks, device: torch.device, dtype: torch.dtype | None
) -> tuple[Layout, OptimizerSet]:
    """Lay out a run's model and make its optimizer; every rank calls this.

    Args:
        settings: The run's settings.
        ranks: This process among those that train.
        device: Where this rank trains.
        dtype: Autocast's dtype, or None for float32.

    Returns:
        The model over its ranks, and its optimizer.
    """
    layout = lay_out(
        settings.model,
        settings.parallel,
        ranks,
        seed=settings.run.seed,
        device=device,
        dtype=dtype,
    )
    optimizer = build_optimizer(
        layout.parts, settings.optim, layout.model.matrix_blocks(), layout.shard_group
    )
    return layout, optimizer


def make_stepper(
    settings: Settings,
    layout: Layout,
    optimizer: OptimizerSet,
    dtype: torch.dtype | None,
    sources: int,
    before_update: Callable[[], None] = lambda: None,
) -> Stepper:
    """Make what makes the steps of a run.

    Args:
        settings: The run's settings.
        layout: Its model over its ranks.
        optimizer: Its optimizer.
        dtype: Autocast's dtype, or None for float32.
        sources: How many sources its data have.
        before_update: Called before weights or moments change, as by what copies them.

    Returns:
        The stepper; its micro-batches are those of the settings.
    """
    return Stepper(
        layout,
        optimizer,
        settings.train,
        layout.ranks,
        seed=settings.run.seed,
        dtype=dtype,
        micro_rows=settings.parallel.micro_batch_rows,
        sources=sources,
        before_update=before_update,
    )
