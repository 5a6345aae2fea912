"""From a run folder, new or old, to a run that is ready for its next step.

Flow: `pretrain` asks `is_finished`, takes the folder, and calls `open_run`, which
    1. opens tokenizer and sources and holds both against what the run began with;
    2. goes back to the stable phase where the budget has grown;
    3. builds model and optimizer and fills them from the newest good checkpoint;
    4. writes down what the run is made of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from summerlm.checkpoint.load import check_tokenizer, newest_good
from summerlm.checkpoint.store import Store
from summerlm.core.config import dump_toml, read_settings
from summerlm.core.errors import NoCheckpointError, UsageError
from summerlm.core.files import RunFolder, read_json, write_atomically
from summerlm.core.hardware import pick_device
from summerlm.core.parts import Part
from summerlm.core.ranks import ALONE
from summerlm.core.runtime import StopRequest
from summerlm.data.tokens.reading import Tokens
from summerlm.model.transformer import Transformer
from summerlm.optim.build import OptimizerSet, build_optimizer
from summerlm.parallel.layout import Layout, lay_out
from summerlm.recipes.data.forecast import check_epochs
from summerlm.recipes.data.locking import Sources, open_run_data
from summerlm.recipes.recording import environment
from summerlm.recipes.settings import Settings, check_changes, derive
from summerlm.tokenizer.registry import load_tokenizer
from summerlm.tokenizer.tokenizer import Tokenizer
from summerlm.train.config import compute_dtype
from summerlm.train.saving import resume


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step.

    Attributes:
        settings: Its settings.
        folder: Its folder, held.
        device: Where it trains.
        dtype: Autocast's dtype, or None for float32.
        tokenizer: Its tokenizer.
        sources: Its data.
        layout: Its model over the ranks, filled.
        model: The model in it.
        optimizer: Its optimizer, filled.
        store: Its checkpoints.
        state: The state it goes on from, or None where it begins.
        resumed: Whether the folder held a run before.
    """

    settings: Settings
    folder: RunFolder
    device: torch.device
    dtype: torch.dtype | None
    tokenizer: Tokenizer
    sources: Sources
    layout: Layout
    model: Transformer
    optimizer: OptimizerSet
    store: Store
    state: dict[str, Any] | None
    resumed: bool


def is_finished(settings: Settings) -> bool:
    """Tell whether a run folder holds a finished run of these settings, changing nothing.

    Args:
        settings: The settings asked for.

    Returns:
        True where nothing is left to do.

    Raises:
        UsageError: If the folder's run can't go on under these settings.
    """
    folder = RunFolder(settings.run.folder)
    if not folder.settings.exists():
        return False
    check_changes(read_settings(Settings, folder.settings), settings)
    last = derive(settings).steps
    if last not in Store(folder.checkpoints, warn=lambda _: None).steps():
        return False
    try:
        state = read_json(newest_good(folder.path) / "state.json")
    except NoCheckpointError:
        return False  # all damaged: opening the run says so
    return bool(state["step"] == last)


def open_run(
    settings: Settings, folder: RunFolder, warn: Callable[[str], None], stop: StopRequest
) -> Run:
    """Bring a run to where its next step can be made.

    Args:
        settings: The run's settings.
        folder: Its folder, held.
        warn: Called with one line for each thing a person should know.
        stop: Ends a wait for data, however long it would be.

    Returns:
        The run.

    Raises:
        InterruptedWaitError: If a request to stop came while the data were opened.
        DataChangedError: If the data are not those the run began with.
        NoCheckpointError: If it has checkpoints and none is good.
    """
    device = pick_device(settings.run.device)
    dtype = compute_dtype(settings.train, device)
    tokenizer = load_tokenizer(settings.tokenizer.name)
    if tokenizer.vocabulary != settings.model.vocabulary:
        raise UsageError(
            f"model.vocabulary ({settings.model.vocabulary}) must be {tokenizer.vocabulary}, "
            f"the size of tokenizer.name = {settings.tokenizer.name!r}"
        )
    with stop.interrupting():
        sources = open_run_data(settings)
        if not isinstance(sources, Tokens):
            for line in check_epochs(settings, sources, tokenizer):
                warn(line)
    resumed = folder.settings.exists()
    store = Store(folder.checkpoints, warn)
    store.clear_drafts()
    if (newest := store.newest_state()) is not None:
        check_tokenizer(tokenizer, newest[1], newest[0])
    if resumed:
        extend(store, read_settings(Settings, folder.settings), settings)

    layout = lay_out(
        settings.model,
        settings.parallel,
        ALONE,
        seed=settings.run.seed,
        device=device,
        dtype=dtype,
    )
    model = layout.model
    optimizer = build_optimizer(
        layout.parts, settings.optim, model.matrix_blocks(), layout.shard_group
    )
    found = resume(store, tables(model, optimizer))
    state = None if found is None else found[1]
    write_identity(settings, folder, tokenizer, sources, device)
    return Run(
        settings=settings,
        folder=folder,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        sources=sources,
        layout=layout,
        model=model.train(),
        optimizer=optimizer,
        store=store,
        state=state,
        resumed=resumed,
    )


def tables(model: Transformer, optimizer: OptimizerSet) -> dict[str, dict[str, Part]]:
    """Give the tensors that a checkpoint holds, as a rank alone holds them."""
    weights = {name: Part.whole(weight.data) for name, weight in model.named_parameters()}
    moments = {name: Part.whole(tensor) for name, tensor in optimizer.tensors().items()}
    return {"model": weights, "optimizer": moments}


def extend(store: Store, old: Settings, new: Settings) -> None:
    """Go back to the stable phase where a larger budget makes later steps another run's.

    Args:
        store: The run's checkpoints; later ones are moved to a branch folder.
        old: The settings in the run folder.
        new: The settings asked for.

    Raises:
        NoCheckpointError: If no checkpoint of the stable phase is left.
    """
    before, now = derive(old), derive(new)
    if now.steps == before.steps:
        return
    assert before.stable_steps is not None, "check_changes refuses what can't be extended"
    steps = store.steps()
    if steps and steps[0] > before.stable_steps:
        raise NoCheckpointError(
            f"{store.folder}: a larger budget goes on from the stable phase, which ended at step "
            f"{before.stable_steps}, but the first checkpoint kept is of step {steps[0]}"
        )
    store.branch_off(before.stable_steps)


def write_identity(
    settings: Settings,
    folder: RunFolder,
    tokenizer: Tokenizer,
    sources: Sources,
    device: torch.device,
) -> None:
    """Write down what the run is made of; the settings last, for they mark a run as begun.

    Args:
        settings: The run's settings.
        folder: Its folder, held.
        tokenizer: Its tokenizer.
        sources: Its data.
        device: Where it trains.
    """
    if not folder.settings.exists():
        lock = [source.lock() for source in sources]
        tokenizer.save(folder.path)
        facts = {
            **environment(device),
            "tokenizer": tokenizer.fingerprint,
            "data": {
                entry["name"]: {
                    "revision": entry["revision"],
                    "files": [file["name"] for file in entry["files"]],
                }
                for entry in lock
            },
        }
        folder.write_json("manifest.json", facts)
    write_atomically(folder.settings, dump_toml(settings).encode())
