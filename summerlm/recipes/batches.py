"""The batches of a run, and the proof of their order.

Flow: `pretrain` and `demo` open a run's loader here; the command `data hash` prints what
`hash_run` yields.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from summerlm.checkpoint.load import newest_good
from summerlm.core.files import read_json
from summerlm.data.loader import Loader, hash_steps
from summerlm.data.sources import Source, open_sources
from summerlm.recipes.settings import Settings, derive
from summerlm.tokenizer.registry import load_tokenizer
from summerlm.tokenizer.tokenizer import Tokenizer


def open_loader(
    settings: Settings,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    state: dict[str, Any] | None,
    *,
    workers: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Open the data of a run at its next step.

    Args:
        settings: The run's settings.
        sources: Its opened sources.
        tokenizer: Its tokenizer.
        state: The data's state of the step to go on after, or None for the first step.
        workers: Worker processes; None = as the settings say.
        rank: This process among `world`.
        world: Ranks that share the lanes.

    Returns:
        The loader; close it when done.
    """
    return Loader(
        sources,
        [source.weight for source in settings.data.sources.values()],
        tokenizer,
        seed=settings.run.seed,
        lanes=settings.data.lanes,
        rows=derive(settings).rows,
        context=settings.model.context,
        workers=settings.data.workers if workers is None else workers,
        prefetch_steps=settings.data.prefetch_steps,
        max_epochs=[source.max_epochs for source in settings.data.sources.values()],
        open_documents=settings.data.open_documents,
        state=state,
        rank=rank,
        world=world,
    )


def hash_run(
    settings: Settings, steps: int, world: int, workers: int, start: Path | None
) -> Iterator[tuple[int, str]]:
    """Make the batches of a run's steps and hash each.

    Args:
        settings: The run's settings.
        steps: How many steps.
        world: Ranks that share the lanes; all of them run on this machine, in turn.
        workers: Worker processes a rank.
        start: A checkpoint or run folder to go on after, or None for the first step.

    Yields:
        The step's number and its SHA-256.

    Raises:
        UsageError: If `world` doesn't divide the lanes.
        DataChangedError: If the checkpoint was made with other data.
    """
    state = None if start is None else read_json(newest_good(start) / "state.json")["data"]
    sources = open_sources(settings.data, settings.data.lanes)
    tokenizer = load_tokenizer(settings.tokenizer.name)
    loaders = [
        open_loader(settings, sources, tokenizer, state, workers=workers, rank=rank, world=world)
        for rank in range(world)
    ]
    try:
        yield from itertools.islice(hash_steps(loaders), steps)
    finally:
        for loader in loaders:
            loader.close()
