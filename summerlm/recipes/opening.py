"""From a run folder, new or old, to a run that is ready for its next step.

Flow: `pretrain` asks `is_finished`, takes the folder, and calls `open_run` on every rank, which
    1. opens tokenizer and sources and holds both against what the run began with;
    2. goes back to the stable phase where the budget has grown;
    3. settles what `parallel.attention` and `parallel.memory` leave open;
    4. lays out model and optimizer and fills them from the newest good checkpoint;
    5. writes down what the run is made of.
What changes the folder is done by the leading rank, and what it finds holds for all.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from summerlm.checkpoint.load import check_tokenizer, newest_good
from summerlm.checkpoint.store import Store
from summerlm.core.config import read_settings
from summerlm.core.errors import NoCheckpointError, UsageError
from summerlm.core.files import RunFolder, read_json
from summerlm.core.hardware import pick_device
from summerlm.core.parts import Part
from summerlm.core.ranks import Ranks
from summerlm.core.runtime import StopRequest
from summerlm.data.tokens.reading import Tokens
from summerlm.optim.build import OptimizerSet
from summerlm.parallel.layout import Layout
from summerlm.recipes.assembling import assemble
from summerlm.recipes.choosing import settle_memory
from summerlm.recipes.data.forecast import check_epochs
from summerlm.recipes.data.locking import Sources, open_run_data
from summerlm.recipes.identity import settle_kernel, write_identity
from summerlm.recipes.settings import Settings, check_changes, derive
from summerlm.tokenizer.registry import load_tokenizer
from summerlm.tokenizer.tokenizer import Tokenizer
from summerlm.train.config import compute_dtype
from summerlm.train.saving import resume


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step.

    Attributes:
        settings: Its settings, with a choice in the place of `parallel.memory`.
        folder: Its folder, held.
        ranks: This process among those that train it.
        device: Where this rank trains.
        dtype: Autocast's dtype, or None for float32.
        tokenizer: Its tokenizer.
        sources: Its data.
        layout: Its model as it lies over the ranks, filled.
        optimizer: Its optimizer, filled.
        store: Its checkpoints.
        state: The state it goes on from, or None where it begins.
        resumed: Whether the folder held a run before.
        chosen: What `parallel.memory` has chosen, in words; None where it was not asked to.
    """

    settings: Settings
    folder: RunFolder
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype | None
    tokenizer: Tokenizer
    sources: Sources
    layout: Layout
    optimizer: OptimizerSet
    store: Store
    state: dict[str, Any] | None
    resumed: bool
    chosen: str | None

    @property
    def tables(self) -> dict[str, dict[str, Part]]:
        """The tensors that a checkpoint holds, as this rank holds them."""
        return {"model": self.layout.parts, "optimizer": self.optimizer.parts()}

    @property
    def state_of_data(self) -> dict[str, Any] | None:
        """Where the data stand at the run's next step, of all ranks; None at the beginning."""
        return self.state["data"] if self.state else None

    def go_back(self) -> "Run":
        """Fill model and optimizer from the newest good checkpoint, on every rank.

        Returns:
            The run as it was then.

        Raises:
            NoCheckpointError: If none is good.
        """
        found = resume(self.store, self.tables, self.ranks)
        if found is None:
            raise NoCheckpointError(f"{self.store.folder}: there is no checkpoint to go back to")
        return replace(self, state=found[1], resumed=True)


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
        with warnings.catch_warnings(action="ignore"):  # opening the run says what is damaged
            state = read_json(newest_good(folder.path) / "state.json")
    except NoCheckpointError:
        return False
    return bool(state["step"] == last)


def open_run(
    settings: Settings,
    folder: RunFolder,
    ranks: Ranks,
    warn: Callable[[str], None],
    stop: StopRequest,
) -> Run:
    """Bring a run to where its next step can be made; every rank calls this.

    Args:
        settings: The run's settings.
        folder: Its folder, held by the leading rank.
        ranks: This process among those that train the run.
        warn: Called on the leading rank with one line for each thing a person should know.
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
    tokenizer = ranks.agree(lambda: open_tokenizer(settings))

    def open_sources() -> Sources:
        with stop.interrupting():
            sources = open_run_data(settings)
            if ranks.leads and not isinstance(sources, Tokens):
                for line in check_epochs(settings, sources, tokenizer):
                    warn(line)
        return sources

    sources = ranks.lead_first(open_sources)
    store = Store(folder.checkpoints, warn)
    resumed = ranks.lead(lambda: prepare_store(settings, folder, store, tokenizer))
    asked = settings
    settings = ranks.lead(lambda: settle_kernel(asked, folder, device, dtype))
    settings, chosen = settle_memory(settings, folder, ranks, device, dtype)

    layout, optimizer = assemble(settings, ranks, device, dtype)
    run = Run(
        settings=settings,
        folder=folder,
        ranks=ranks,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        sources=sources,
        layout=layout,
        optimizer=optimizer,
        store=store,
        state=None,
        resumed=resumed,
        chosen=chosen,
    )
    found = resume(store, run.tables, ranks)
    kernel = settings.parallel.attention
    ranks.lead(lambda: write_identity(asked, folder, tokenizer, sources, device, kernel))
    return run if found is None else replace(run, state=found[1])


def open_tokenizer(settings: Settings) -> Tokenizer:
    """Open a run's tokenizer.

    Args:
        settings: The run's settings.

    Returns:
        The tokenizer.

    Raises:
        UsageError: If the model's vocabulary is not its size.
    """
    tokenizer = load_tokenizer(settings.tokenizer.name)
    if tokenizer.vocabulary != settings.model.vocabulary:
        raise UsageError(
            f"model.vocabulary ({settings.model.vocabulary}) must be {tokenizer.vocabulary}, "
            f"the size of tokenizer.name = {settings.tokenizer.name!r}"
        )
    return tokenizer


def prepare_store(
    settings: Settings, folder: RunFolder, store: Store, tokenizer: Tokenizer
) -> bool:
    """Bring a run's checkpoints to where it can go on from the newest good one.

    Args:
        settings: The run's settings.
        folder: Its folder, held.
        store: Its checkpoints.
        tokenizer: Its tokenizer.

    Returns:
        Whether the folder held a run before.

    Raises:
        UsageError: If the checkpoints were made with another tokenizer; nothing is moved then.
    """
    store.clear_drafts()
    if (newest := store.newest_state()) is not None:
        check_tokenizer(tokenizer, newest[1], newest[0])
    if not folder.settings.exists():
        return False
    extend(store, read_settings(Settings, folder.settings), settings)
    return True


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
