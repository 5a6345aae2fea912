"""The batches of a run, and the proof of their order.

Flow: `pretrain` and `demo` open a run's loader here; the command `data hash` prints what
`hash_run` yields.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from summerlm.checkpoint.load import newest_good
from summerlm.core.files import read_json
from summerlm.core.progress import progress_bar
from summerlm.data.loader import Loader, Steps, hash_steps, refuse_world
from summerlm.data.tokens.reading import Tokens, TokenSteps
from summerlm.recipes.data.locking import Sources, open_run_data
from summerlm.recipes.settings import Settings, derive
from summerlm.tokenizer.registry import load_tokenizer
from summerlm.tokenizer.tokenizer import Tokenizer


def open_loader(
    settings: Settings,
    sources: Sources,
    tokenizer: Tokenizer,
    state: dict[str, Any] | None,
    *,
    workers: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Steps:
    """Open the data of a run at its next step.

    Args:
        settings: The run's settings.
        sources: Its opened sources, or tokens.
        tokenizer: Its tokenizer.
        state: The data's state of the step to go on after, or None for the first step.
        workers: Worker processes; None = as the settings say.
        rank: This process among `world`.
        world: Ranks that share the lanes.

    Returns:
        The loader; close it when done.

    Raises:
        UsageError: If `world` doesn't divide the lanes.
        DataChangedError: If the state was made with other data.
        SourceDownError: If a source can't be read.
    """
    if isinstance(sources, Tokens):
        return TokenSteps(sources, tokenizer.bos, state=state, rank=rank, world=world)
    rows = derive(settings).rows
    behind = _behind(state, rows // settings.data.lanes) if state is not None else 0
    loader = Loader(
        sources,
        [source.weight for source in settings.data.sources.values()],
        tokenizer,
        seed=settings.run.seed,
        lanes=settings.data.lanes,
        rows=rows,
        context=settings.model.context,
        workers=settings.data.workers if workers is None else workers,
        prefetch_steps=settings.data.prefetch_steps,
        max_epochs=[source.max_epochs for source in settings.data.sources.values()],
        open_documents=settings.data.open_documents,
        state=None if state is None else {**state, "step": state["step"] - behind},
        rank=rank,
        world=world,
    )
    try:
        with progress_bar() as progress:
            for dealt in range(behind):
                next(loader)
                progress("dealing again to the checkpoint's step", dealt + 1, behind)
    except BaseException:
        loader.close()
        raise
    return loader


def _behind(state: Mapping[str, Any], lane_rows: int) -> int:
    """Tell how many steps a state's lanes stand before its step.

    None in a state of a `Loader`; one of `TokenSteps` has the lanes before the step's shard.
    """
    rows = next((lane["rows"] for lane in state["lanes"].values()), 0)
    return int(state["step"] - rows // lane_rows)


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
        SourceDownError: If a source can't be read.
    """
    if settings.data.lanes % world:
        raise refuse_world(world, settings.data.lanes)
    state = None if start is None else read_json(newest_good(start) / "state.json")["data"]
    sources = open_run_data(settings, training=False)
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
