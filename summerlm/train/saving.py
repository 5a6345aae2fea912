"""Saving a run and going on with it: everything that the next step depends on.

Flow: `recipes` make a `Saver` for the run; its `save` is a hook, its `restore` fills a freshly
built model and optimizer before the first step.

A checkpoint holds the weights, the optimizer's moments, and a JSON state: step, tokens, the
data's position, ledger, guard and the tokenizer's fingerprint. Random numbers need no state:
every draw is seeded by what it belongs to.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from summerlm.checkpoint.state import model_tensors, restore
from summerlm.checkpoint.store import Contents, DamagedError, Store, read_tensors
from summerlm.core.errors import NoCheckpointError, SaveError
from summerlm.core.files import read_json
from summerlm.data.ledger import Ledger
from summerlm.model.transformer import Transformer
from summerlm.optim.build import OptimizerSet
from summerlm.train.guards import SkipGuard
from summerlm.train.loop import Event


class Saver:
    """Writes checkpoints of one run.

    Args:
        store: Where they go.
        model: The model.
        optimizer: Its optimizer.
        guard: The guard, whose counts are part of the state.
        ledger: The ledger, whose sums are part of the state.
        files: Small files that make a checkpoint self-sufficient, by name.
        tokenizer: The tokenizer's fingerprint.
        keep_last: How many checkpoints stay.
        keep_step: A step whose checkpoint always stays.
        warn: Called with one line when a save fails.
    """

    def __init__(
        self,
        store: Store,
        model: Transformer,
        optimizer: OptimizerSet,
        guard: SkipGuard,
        ledger: Ledger,
        *,
        files: Mapping[str, bytes],
        tokenizer: str,
        keep_last: int,
        keep_step: int | None,
        warn: Callable[[str], None],
    ) -> None:
        self._store = store
        self._model = model
        self._optimizer = optimizer
        self._guard = guard
        self._ledger = ledger
        self._files = dict(files)
        self._tokenizer = tokenizer
        self._keep_last = keep_last
        self._keep_steps = () if keep_step is None else (keep_step,)
        self._warn = warn
        self._saved: int | None = None

    def save(self, event: Event) -> None:
        """Publish the state after a step, once a step, and prune older ones.

        Args:
            event: The step.

        Raises:
            SaveError: If the disk refuses; the checkpoints before it are untouched.
        """
        if self._saved == event.step:
            return
        self._store.publish(event.step, self._contents(event))
        self._saved = event.step
        self._store.prune(self._keep_last, self._keep_steps)

    def try_save(self, event: Event) -> None:
        """Save during a run: a disk that refuses is reported, and the run goes on.

        Args:
            event: The step.
        """
        try:
            self.save(event)
        except SaveError as error:
            self._warn(f"step {event.step} not saved, training goes on: {error}")

    def _contents(self, event: Event) -> Contents:
        state = {
            "step": event.step,
            "tokens": event.tokens,
            "tokenizer": self._tokenizer,
            "guard": self._guard.state(),
            "ledger": self._ledger.state(),
            "data": event.data.state,
        }
        return Contents(
            tensors={
                "model": model_tensors(self._model),
                "optimizer": self._optimizer.tensors(),
            },
            values={
                "state": state,
                "model": self._model.config.model_dump(mode="json"),
            },
            files=self._files,
        )


def resume(folder: Path, model: Transformer, optimizer: OptimizerSet) -> dict[str, Any]:
    """Fill a model and its optimizer from a verified checkpoint.

    Args:
        folder: The checkpoint.
        model: A model of the run's settings; its weights are replaced.
        optimizer: Its optimizer; its moments are replaced.

    Returns:
        The JSON state that `Saver` wrote.

    Raises:
        NoCheckpointError: If the tensors don't fit the model or are not finite.
    """
    try:
        path = folder / "model.safetensors"
        restore(model_tensors(model), read_tensors(path), path)
        path = folder / "optimizer.safetensors"
        restore(optimizer.tensors(), read_tensors(path), path)
    except DamagedError as error:
        raise NoCheckpointError(str(error)) from None
    state: dict[str, Any] = read_json(folder / "state.json")
    return state
