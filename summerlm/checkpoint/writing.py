"""What a save does to memory and disk on one rank, from the copy to the published folder.

Flow: `flight` has one `Writer` a rank, and calls it from the thread of a save: `copy`, `write`, and
on the leading rank `publish`, once all ranks have written. A `Writer` never speaks to other ranks.
"""

import shutil
import threading
from collections.abc import Mapping
from typing import Any

from summerlm.checkpoint.manifest import write_manifest
from summerlm.checkpoint.pieces import Plan, Tables
from summerlm.checkpoint.replicas import Sums, sum_shared
from summerlm.checkpoint.snapshot import Snapshot
from summerlm.checkpoint.store import Retention, Store
from summerlm.checkpoint.tensors import check_header, write_file
from summerlm.core.failpoints import reach

Files = dict[str, dict[str, Any]]  # bytes and hash of each, for the manifest


class AbandonedError(Exception):
    """The process wants to end: the thread stops between two chunks."""


class Writer:
    """Copies, writes and publishes one state at a time.

    Args:
        store: Where checkpoints go.
        plan: Who holds and who writes what.
        rank: This rank.
        tables: The live tensors of this rank.
        nonce: What names the drafts of this start, the same on every rank.
        identity: Hashes that tell what the checkpoint belongs to, for the manifest.
        retention: What stays when a new one is there.

    Attributes:
        queued: Whether `copy` returns before the copy is made, behind work in a GPU's queue.
        sums: Of what this rank shares with others, in the order of `shared_pieces`; empty until
            all are made.
        chunks: Written by this process so far: whether its disk still moves.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        rank: int,
        tables: Tables,
        *,
        nonce: str,
        identity: Mapping[str, str],
        retention: Retention,
    ) -> None:
        self._store, self._plan, self._rank, self._tables = store, plan, rank, tables
        self._nonce, self._identity, self._retention = nonce, dict(identity), retention
        self._snapshot = Snapshot(tables, plan, rank)
        self._others: Sums = {}
        self._abandoned = threading.Event()
        self.queued = self._snapshot.queued
        self.sums: list[int] = []
        self.chunks = 0

    def copy(self) -> None:
        """Take what updates change: what this rank writes, and sums of what others do."""
        self.sums = []
        tables = self._tables
        self._others = sum_shared(
            self._plan, self._rank, lambda s, n: tables[s][n].tensor, written=False
        )
        self._snapshot.take()
        reach("save.copied")

    def write(self, step: int) -> Files:
        """Write what was copied into the draft of a step, and sum it up.

        Args:
            step: The step.

        Returns:
            The files.

        Raises:
            NotFiniteError: If a value is NaN or infinite.
            OSError: If the disk refuses.
            SaveError: If a file doesn't read back as it was written.
        """
        draft = self._store.draft(step, self._nonce)
        draft.mkdir(parents=True, exist_ok=True)
        reach("write.drafted")
        self._snapshot.wait()
        own = sum_shared(self._plan, self._rank, self._snapshot.tensor, written=True)
        self.sums = [value for _, value in sorted({**self._others, **own}.items())]
        self._snapshot.check_finite()
        files = {}
        for stem, layout in self._snapshot.layouts.items():
            name = self._plan.file(stem, self._rank)
            files[name] = write_file(draft / name, self._snapshot.blocks(stem), self._go_on)
            check_header(draft / name, layout)
        reach("write.done")
        return files

    def publish(
        self, step: int, world: int, files: Files, small: Mapping[str, bytes]
    ) -> dict[str, Any]:
        """Make a checkpoint of the draft of a step, and delete what is no longer kept.

        Args:
            step: The step.
            world: Ranks that have written.
            files: What they have written.
            small: Files that are still to be written, by name.

        Returns:
            `bytes` of all files, and `notes` that a person should see.

        Raises:
            OSError: If the disk refuses, or files are not what was written.
        """
        reach("publish.begun")
        draft, files = self._store.draft(step, self._nonce), dict(files)
        for name, entry in files.items():
            if (draft / name).stat().st_size != entry["bytes"]:
                raise OSError(f"{name} changed after it was written")
        for name, data in small.items():
            files[name] = write_file(draft / name, [data], self._go_on)
        facts = {
            "step": step,
            "world": world,
            "identity": self._identity,
            "files": dict(sorted(files.items())),
            "tensors": self._plan.table(),
        }
        write_manifest(draft, facts)
        self._go_on()
        self._store.publish(draft, step)
        try:
            notes = self._store.prune(self._retention)
        except OSError as error:  # what is published stays published
            notes = [f"{self._store.folder}: older checkpoints not looked through: {error}"]
        reach("publish.done")
        return {"bytes": sum(entry["bytes"] for entry in files.values()), "notes": notes}

    def drop(self, step: int) -> None:
        """Delete the draft of a step."""
        shutil.rmtree(self._store.draft(step, self._nonce), ignore_errors=True)

    def abandon(self) -> None:
        """Let what is being written end at its next chunk, with `AbandonedError`."""
        self._abandoned.set()

    def _go_on(self) -> None:
        self.chunks += 1
        if self._abandoned.is_set():
            raise AbandonedError
