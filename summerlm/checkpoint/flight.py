"""Saves that are written while training goes on: one in flight, polled each step.

Flow:
    1. `Flight.start` takes a `Snapshot`, and returns: a thread on every rank writes its files into
       one draft, hashing, syncing and opening each again;
    2. each step the loop exchanges every rank's `report` with what it exchanges anyway, and hands
       all of them to `poll`, so all ranks see the same at the same step;
    3. when all have written equal replicas, the leading rank's thread publishes, prunes, reports;
    4. `poll` returns the `Outcome`. A failure anywhere drops the draft; the next save is free.

Threads never speak to other ranks. A process alone is the same code with one report.
"""

import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from summerlm.checkpoint.manifest import write_manifest
from summerlm.checkpoint.pieces import Tables, plan_pieces
from summerlm.checkpoint.replicas import Sums, difference, sum_shared
from summerlm.checkpoint.snapshot import NotFiniteError, Snapshot
from summerlm.checkpoint.store import Retention, Store
from summerlm.checkpoint.tensors import check_header, write_file
from summerlm.core.errors import SaveError
from summerlm.core.failpoints import reach
from summerlm.core.ranks import Ranks

CLOSE_S = 10.0  # how long a process that has to end waits for its disk
Report = dict[str, Any]  # plain values, for ranks to exchange


@dataclass(frozen=True)
class Outcome:
    """How a save ended.

    Attributes:
        step: The step that was to be saved.
        error: Why it failed, or None where it is published.
        stall_s: Seconds that training stood still for it.
        seconds: Seconds from asking until all ranks knew.
        bytes: Bytes of all its files; 0 where it failed.
        notes: What a person should know besides.
    """

    step: int
    error: str | None
    stall_s: float
    seconds: float
    bytes: int = 0
    notes: Sequence[str] = ()


class _AbandonedError(Exception):
    """The process wants to end: the thread stops between two chunks."""


@dataclass
class _Save:
    """One save on its way; all but `report` is the same on every rank."""

    number: int
    step: int
    began: float
    stall_s: float = 0.0
    stage: str = "write"
    failed: bool = False
    sums: list[int] = field(default_factory=list)
    report: Report | None = None
    bug: BaseException | None = None
    thread: threading.Thread | None = field(default=None, repr=False)


class Flight:
    """Saves the state of a run, one save at a time.

    Args:
        store: Where checkpoints go.
        ranks: The ranks of the job; every rank makes its `Flight` at the same place.
        tables: The live tensors of this rank.
        identity: Hashes that tell what the checkpoint belongs to, for the manifest.
        retention: What stays when a new one is there.
    """

    def __init__(
        self,
        store: Store,
        ranks: Ranks,
        tables: Tables,
        *,
        identity: Mapping[str, str],
        retention: Retention,
    ) -> None:
        self._store, self._ranks, self._tables = store, ranks, tables
        self._identity, self._retention = dict(identity), retention
        self._plan = plan_pieces(tables, ranks)
        self._snapshot = Snapshot(tables, self._plan, ranks.rank)
        self._nonce = str(ranks.exchange(uuid.uuid4().hex[:8])[0])
        self._save: _Save | None = None
        self._number = 0
        self._chunks = 0  # written by this process: whether its disk still moves
        self._abandoned = threading.Event()

    @property
    def step(self) -> int | None:
        """The step whose save is in flight, or None; the same on every rank."""
        return self._save.step if self._save else None

    def start(
        self, step: int, value: Any, files: Callable[[list[Any]], Mapping[str, bytes]]
    ) -> None:
        """Take the state as it is now and begin to write it; nothing may be in flight.

        Args:
            step: The completed step it belongs to.
            value: What the small files need of this rank; plain values.
            files: Makes the small files, by name, from the values of all ranks; called on the
                leading rank.
        """
        assert self._save is None, "one save at a time"
        began = time.monotonic()
        reach("save.asked")
        others = sum_shared(
            self._plan, self._ranks.rank, lambda s, n: self._tables[s][n].tensor, written=False
        )
        said = self._ranks.exchange(value)
        small = files(said) if self._ranks.leads else {}
        self._snapshot.take()
        reach("save.copied")
        self._number += 1
        self._save = save = _Save(self._number, step, began)
        if self._ranks.world == 1:  # nobody to wait for: no step has to pass before it is published
            save.stage = "publish"
            self._run(save, lambda: self._publish(step, self._write(save, small, others)["files"]))
        else:
            self._run(save, lambda: self._write(save, small, others))
        save.stall_s = time.monotonic() - began

    def report(self) -> Report | None:
        """Tell what this rank has to say, for `poll` on all ranks.

        Returns:
            None while it works or has nothing to do; else plain values.
        """
        return self._save.report if self._save else None

    def poll(self, reports: Sequence[Report | None]) -> Outcome | None:
        """Take note of what all ranks reported; every rank calls this at the same place.

        Args:
            reports: What `report` returned on each rank, by rank.

        Returns:
            How the save ended, once; None while it is on its way or nothing is.

        Raises:
            CorruptionError: If replicas differ; nothing is published then.
        """
        save = self._save
        if save is None:
            return None
        if save.bug is not None:
            raise save.bug  # ours, not the disk's: it keeps its traceback
        current = [r if r and r["key"] == (save.number, save.stage) else None for r in reports]
        errors = [(i, r["error"]) for i, r in enumerate(current) if r and r["error"]]
        ended = all(current) if save.stage == "write" else current[0] is not None
        outcome = None
        if errors and not save.failed:
            save.failed = True
            rank, error = errors[0]
            where = f" on rank {rank}" if self._ranks.world > 1 else ""
            text = f"{self._store.path(save.step)}: can't be saved{where}: {error}"
            outcome = self._outcome(save, text)
        if not ended:
            return outcome
        if found := difference(self._plan, [r["sums"] for r in current if r], save.step):
            self._drop(save.step)
            raise found
        if save.failed:
            self._drop(save.step)
            self._save = None
        elif save.stage == "write":
            self._publish_all([r for r in current if r], save)
        else:
            reach("save.announced")
            self._save = None
            outcome = self._outcome(save, None, current[0])
        return outcome

    def wait(self) -> Outcome | None:
        """Wait until nothing is in flight, exchanging reports; every rank calls this.

        Returns:
            How the save ended; None if nothing was in flight, or `poll` has said it already.
        """
        outcome, chunks, began = None, 0, time.monotonic()
        while (save := self._save) is not None:
            if save.thread is not None:
                save.thread.join(timeout=0.05)
            said = self._ranks.exchange((self.report(), self._chunks))
            if (written := sum(chunks for _, chunks in said)) != chunks:
                self._ranks.phase("save", save.step)  # the disk takes its time, but it takes
                chunks = written
            save.stall_s += time.monotonic() - began
            began = time.monotonic()
            outcome = self.poll([report for report, _ in said]) or outcome
        return outcome

    def close(self) -> None:
        """Give up what is in flight, as when the process has to end; asks no other rank."""
        self._abandoned.set()
        if self._save is not None and self._save.thread is not None:
            self._save.thread.join(timeout=CLOSE_S)
            if not self._save.thread.is_alive():  # else it may still publish: all must be there
                self._drop(self._save.step)

    def _run(self, save: _Save, act: Callable[[], Report]) -> None:
        """Do a stage's work in a thread, and report it."""
        save.report, key = None, (save.number, save.stage)

        def work() -> None:
            report: Report = {}
            try:
                report, error = act(), None
            except (OSError, SaveError, NotFiniteError, MemoryError) as failure:
                error = str(failure) or type(failure).__name__
            except _AbandonedError:
                return
            except BaseException as failure:
                save.bug, error = failure, traceback.format_exc()
            save.report = {"key": key, "error": error, "sums": save.sums, **report}

        save.thread = threading.Thread(target=work, name=f"save-{key}", daemon=True)
        save.thread.start()

    def _write(self, save: _Save, small: Mapping[str, bytes], others: Sums) -> Report:
        draft = self._store.draft(save.step, self._nonce)
        draft.mkdir(parents=True, exist_ok=True)
        reach("write.drafted")
        self._snapshot.wait()
        copied = sum_shared(self._plan, self._ranks.rank, self._snapshot.tensor, written=True)
        save.sums = [value for _, value in sorted({**others, **copied}.items())]
        self._snapshot.check_finite()
        files = {}
        for stem, layout in self._snapshot.layouts.items():
            name = self._plan.file(stem, self._ranks.rank)
            files[name] = write_file(draft / name, self._snapshot.blocks(stem), self._go_on)
            check_header(draft / name, layout)
        for name, data in small.items():
            files[name] = write_file(draft / name, [data], self._go_on)
        reach("write.done")
        return {"files": files}

    def _publish_all(self, reports: Sequence[Report], save: _Save) -> None:
        files = {name: entry for r in reports for name, entry in r["files"].items()}
        save.stage, save.report = "publish", None
        if self._ranks.leads:
            self._run(save, lambda: self._publish(save.step, files))

    def _publish(self, step: int, files: Mapping[str, Any]) -> Report:
        reach("publish.begun")
        draft = self._store.draft(step, self._nonce)
        for name, entry in files.items():
            if (draft / name).stat().st_size != entry["bytes"]:
                raise OSError(f"{name} changed after it was written")
        facts = {
            "step": step,
            "world": self._ranks.world,
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

    def _drop(self, step: int) -> None:
        if self._ranks.leads:
            shutil.rmtree(self._store.draft(step, self._nonce), ignore_errors=True)

    def _go_on(self) -> None:
        self._chunks += 1
        if self._abandoned.is_set():
            raise _AbandonedError

    def _outcome(self, save: _Save, error: str | None, report: Report | None = None) -> Outcome:
        seconds = time.monotonic() - save.began
        facts = report or {"bytes": 0, "notes": []}
        return Outcome(save.step, error, save.stall_s, seconds, facts["bytes"], facts["notes"])
