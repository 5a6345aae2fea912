"""Saves that are written while training goes on: one in flight, polled each step.

Flow:
    1. `Flight.start` returns at once: a thread on every rank copies the state and writes its files
       into one draft, hashing, syncing and opening each again (`writing`);
    2. the next step makes its gradients meanwhile; before it updates what is being copied it calls
       `Flight.release`, which waits for the copy;
    3. each step the loop exchanges every rank's `report` with what it exchanges anyway, and hands
       all of them to `poll`, so all ranks see the same at the same step;
    4. when all have written equal replicas, the leading rank's thread adds the small files,
       publishes, prunes, reports;
    5. `poll` returns the `Outcome`. A failure anywhere drops the draft; the next save is free.

Threads never speak to other ranks. A process alone is the same code with one report.
"""

import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from summerlm.checkpoint.pieces import Tables, plan_pieces
from summerlm.checkpoint.replicas import difference
from summerlm.checkpoint.snapshot import NotFiniteError
from summerlm.checkpoint.store import Retention, Store
from summerlm.checkpoint.writing import AbandonedError, Files, Writer
from summerlm.core.errors import SaveError
from summerlm.core.failpoints import reach
from summerlm.core.ranks import Ranks

CLOSE_S = 10.0  # how long a process that has to end waits for its disk
Report = dict[str, Any]  # plain values, for ranks to exchange
SmallFiles = Callable[[Sequence[Any]], Mapping[str, bytes]]  # from the values of all ranks


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


@dataclass
class _Save:
    """One save on its way; all but `report` is the same on every rank."""

    number: int
    step: int
    began: float
    value: Any
    files: SmallFiles
    copied: threading.Event = field(default_factory=threading.Event)
    stall_s: float = 0.0
    stage: str = "write"
    failed: bool = False
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
        self._store, self._ranks = store, ranks
        self._plan = plan_pieces(tables, ranks)
        nonce = str(ranks.exchange(uuid.uuid4().hex[:8])[0])
        self._writer = Writer(
            store,
            self._plan,
            ranks.rank,
            tables,
            nonce=nonce,
            identity=identity,
            retention=retention,
        )
        self._save: _Save | None = None
        self._number = 0

    @property
    def step(self) -> int | None:
        """The step whose save is in flight, or None; the same on every rank."""
        return self._save.step if self._save else None

    def start(self, step: int, value: Any, files: SmallFiles) -> None:
        """Begin to save the state as it is now; nothing may be in flight.

        Until `release` has returned nothing may change the live tensors.

        Args:
            step: The completed step it belongs to.
            value: What the small files need of this rank; plain values, which stay as they are.
            files: Makes the small files, by name, from the values of all ranks; called on the
                leading rank when all have written.
        """
        assert self._save is None, "one save at a time"
        began = time.monotonic()
        reach("save.asked")
        self._number += 1
        self._save = save = _Save(self._number, step, began, value, files)
        if self._writer.queued:
            self._writer.copy()  # behind the work that makes the state: the host doesn't wait
            save.copied.set()
        if self._ranks.world == 1:  # nobody to wait for: no step has to pass before it is published
            save.stage = "publish"
            self._run(save, lambda: self._publish(save, self._write(save)["files"], [value]))
        else:
            self._run(save, lambda: self._write(save))
        save.stall_s = time.monotonic() - began

    def release(self) -> None:
        """Wait until what an update is about to change has been copied; before every update."""
        save = self._save
        if save is not None and not save.copied.is_set():
            began = time.monotonic()
            save.copied.wait()
            save.stall_s += time.monotonic() - began

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
            said = self._ranks.exchange((self.report(), self._writer.chunks))
            if (written := sum(chunks for _, chunks in said)) != chunks:
                self._ranks.phase("save", save.step)  # the disk takes its time, but it takes
                chunks = written
            save.stall_s += time.monotonic() - began
            began = time.monotonic()
            outcome = self.poll([report for report, _ in said]) or outcome
        return outcome

    def close(self) -> None:
        """Give up what is in flight, as when the process has to end; asks no other rank."""
        self._writer.abandon()
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
            except AbandonedError:
                return
            except BaseException as failure:
                save.bug, error = failure, traceback.format_exc()
            finally:
                save.copied.set()  # where it failed, too: training must not wait for it
            save.report = {"key": key, "error": error, "sums": self._writer.sums, **report}

        save.thread = threading.Thread(target=work, name=f"save-{key}", daemon=True)
        save.thread.start()

    def _write(self, save: _Save) -> Report:
        if not save.copied.is_set():
            self._writer.copy()
            save.copied.set()
        return {"files": self._writer.write(save.step), "value": save.value}

    def _publish_all(self, reports: Sequence[Report], save: _Save) -> None:
        files = {name: entry for r in reports for name, entry in r["files"].items()}
        values = [report["value"] for report in reports]
        save.stage, save.report = "publish", None
        if self._ranks.leads:
            self._run(save, lambda: self._publish(save, files, values))

    def _publish(self, save: _Save, files: Files, values: Sequence[Any]) -> Report:
        return self._writer.publish(save.step, self._ranks.world, files, save.files(values))

    def _drop(self, step: int) -> None:
        if self._ranks.leads:
            self._writer.drop(step)

    def _outcome(self, save: _Save, error: str | None, report: Report | None = None) -> Outcome:
        seconds = time.monotonic() - save.began
        facts = report or {"bytes": 0, "notes": []}
        return Outcome(save.step, error, save.stall_s, seconds, facts["bytes"], facts["notes"])
