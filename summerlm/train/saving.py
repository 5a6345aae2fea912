"""Saving a run and going on with it: everything that the next step depends on.

Flow: `recipes` make a `Saver` for the run; its `save` is a hook. The loop puts `Saver.report` into
what ranks exchange each step and hands all reports to `Saver.poll`; `Saver.finish` waits. `resume`
fills a freshly laid out model and optimizer before the first step.

A checkpoint holds the weights, the optimizer's moments, and a JSON state: step, tokens, the data's
position, the tokenizer's fingerprint and what else the recipe names, as ledger and guard. Random
numbers need no state: every draw is seeded by what it belongs to.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from summerlm.checkpoint.flight import Flight, Outcome, Report, SmallFiles
from summerlm.checkpoint.pieces import Tables
from summerlm.checkpoint.reading import fill
from summerlm.checkpoint.store import Retention, Store
from summerlm.core.errors import SaveError
from summerlm.core.files import read_json
from summerlm.core.ranks import ALONE, Ranks
from summerlm.data.loader import merge_states
from summerlm.train.loop import Event


class Saver:
    """Writes checkpoints of one run; every rank makes one at the same place.

    Args:
        store: Where they go.
        ranks: The ranks of the job.
        tables: This rank's live tensors: "model" the weights, "optimizer" the moments.
        states: What gives further parts of the JSON state, by name; the leading rank's are saved.
        files: Small files that make a checkpoint self-sufficient, by name.
        identity: Hashes for the manifest: `tokenizer` (its fingerprint), `settings`, `data`.
        retention: Which checkpoints stay.
        warn: Called with one line when a save fails.
        saved: Called when a save is published.
    """

    def __init__(
        self,
        store: Store,
        ranks: Ranks,
        tables: Tables,
        *,
        states: Mapping[str, Callable[[], Any]],
        files: Mapping[str, bytes],
        identity: Mapping[str, str],
        retention: Retention,
        warn: Callable[[str], None],
        saved: Callable[[Outcome], None],
    ) -> None:
        self._flight = Flight(store, ranks, tables, identity=identity, retention=retention)
        self._states, self._files = dict(states), dict(files)
        self._tokenizer = identity["tokenizer"]
        self._warn, self._announce = warn, saved
        self._saved: int | None = None

    def save(self, event: Event) -> None:
        """Begin to save the state after a step, once a step; every rank calls this.

        A save that is still on its way is waited for.

        Args:
            event: The step; its data's state is this rank's.
        """
        if self._flight.step is not None and self._flight.step != event.step:
            self._take_note(self._flight.wait())
        if event.step not in (self._saved, self._flight.step):
            self._flight.start(event.step, event.data.state, self._small_files(event))

    def release(self) -> None:
        """Wait until what an update changes has been copied; the stepper calls it before each."""
        self._flight.release()

    def report(self) -> Report | None:
        """Tell what this rank has to say of the save in flight, for `poll` on all ranks.

        Returns:
            Plain values, or None.
        """
        return self._flight.report()

    def poll(self, reports: Sequence[Report | None]) -> None:
        """Take note of what all ranks reported; every rank calls this at the same place.

        Args:
            reports: What `report` returned on each rank, by rank.

        Raises:
            CorruptionError: If replicas differ; nothing is published then.
        """
        self._take_note(self._flight.poll(reports))

    def settle(self, _: Event) -> None:
        """Wait for the save in flight, before something that takes longer than steps do."""
        self._take_note(self._flight.wait())

    def finish(self) -> None:
        """Wait until the save in flight is published; every rank calls this.

        Raises:
            SaveError: If it fails.
        """
        outcome = self._flight.wait()
        if outcome is not None and outcome.error is not None:
            raise SaveError(outcome.error)
        self._take_note(outcome)

    def close(self) -> None:
        """Give up what is in flight, as when this rank failed; asks no other rank."""
        self._flight.close()

    def _take_note(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        if outcome.error is not None:
            self._warn(f"step {outcome.step} not saved, training goes on: {outcome.error}")
            return
        self._saved = outcome.step
        for note in outcome.notes:
            self._warn(note)
        self._announce(outcome)

    def _small_files(self, event: Event) -> SmallFiles:
        """Give what makes the small files as the run stands now, whenever it is called."""
        state = {
            "step": event.step,
            "tokens": event.tokens,
            "tokenizer": self._tokenizer,
            **{name: give() for name, give in self._states.items()},
        }
        now = json.dumps(state, allow_nan=False)  # what gave it goes on

        def make(lanes: Sequence[dict[str, Any]]) -> dict[str, bytes]:
            whole = {**json.loads(now), "data": merge_states(lanes)}
            return {**self._files, "state.json": json.dumps(whole, allow_nan=False).encode()}

        return make


def resume(
    store: Store, tables: Tables, ranks: Ranks = ALONE
) -> tuple[Path, dict[str, Any]] | None:
    """Fill this rank's tensors from the newest checkpoint that can be trusted.

    Any layout and number of ranks may have written it. Damaged ones are set aside by the leading
    rank, with a warning, and the one before is taken by all.

    Args:
        store: The run's checkpoints.
        tables: This rank's live tensors, "model" and "optimizer"; they are overwritten.
        ranks: The ranks of the job; every rank calls this at the same place.

    Returns:
        The checkpoint and its JSON state, the same on every rank; None where there is none.

    Raises:
        NoCheckpointError: If all are damaged or the newest good one's tensors are not this run's;
            nothing on disk is changed.
    """

    def read(folder: Path, manifest: dict[str, Any]) -> None:
        for stem, parts in tables.items():
            fill(folder, manifest, stem, parts)

    folder = store.latest(ranks, read)
    return None if folder is None else (folder, read_json(folder / "state.json"))
