"""The checkpoints of a run on disk: found, trusted, kept and put away; never overwritten.

Flow:
    1. `flight` fills a draft `tmp-<step>-<id>` and calls `Store.publish`: folder synced, renamed
       to `step-<step>`, parent synced: now it exists;
    2. `Store.latest` takes the highest step that verifies and sets damaged ones aside, loudly;
    3. `Store.prune` keeps what a `Retention` says, counting those that verify, and the best one.

Nothing on the load path is a pickle: tensors are safetensors, everything else is JSON or TOML.
"""

import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from summerlm.checkpoint.best import Measured, best_first
from summerlm.checkpoint.manifest import STEP, DamagedError, check_file, read_manifest, verify
from summerlm.core.errors import NoCheckpointError, SaveError
from summerlm.core.failpoints import reach
from summerlm.core.files import publish_folder, read_json, sync_folder
from summerlm.core.ranks import ALONE, Ranks

# folders beside the checkpoints, by how their names begin
ASIDE = {
    "branch-": "checkpoints that a rollback or a larger budget has moved",
    "damaged-": "a damaged checkpoint that a start of the run has set aside",
    "tmp-": "a save that was cut short",
    "del-": "a checkpoint whose deletion was cut short",
}
DRAFTS = ("tmp-", "del-")  # of these nothing is of use to anyone


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        last: How many of the newest that verify.
        every: Steps divisible by this stay for good; None = none of them.
        steps: Further steps that stay.
    """

    last: int
    every: int | None = None
    steps: frozenset[int] = frozenset()

    def keeps(self, step: int) -> bool:
        """Tell whether a step stays however many newer ones there are."""
        return step in self.steps or (self.every is not None and step % self.every == 0)


def _no_reading(folder: Path, manifest: dict[str, Any]) -> None:
    """Read nothing of a checkpoint that verifies."""


class Store:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; made with the first save.
        warn: Called with one line for each thing a person should know.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._warn = warn
        self._good: dict[int, bool] = {}  # verdicts of this process

    def path(self, step: int) -> Path:
        """Name the folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """List the steps that have a published checkpoint, good or damaged, in order."""
        if not self.folder.is_dir():
            return []
        matches = (STEP.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def draft(self, step: int, nonce: str) -> Path:
        """Name the folder in which a process that draws a nonce writes a step's checkpoint."""
        return self.folder / f"tmp-{step:08d}-{nonce}"

    def publish(self, draft: Path, step: int) -> None:
        """Make a finished draft the checkpoint of a step.

        Args:
            draft: A folder beside, with its manifest; every file is synced.
            step: The completed step it belongs to.

        Raises:
            SaveError: If the step has a checkpoint already or the disk refuses.
        """
        sync_folder(self.folder.parent)  # the first save has made the folder itself
        publish_folder(draft, self.path(step))
        self._good[step] = True

    def latest(
        self,
        ranks: Ranks = ALONE,
        read: Callable[[Path, dict[str, Any]], None] = _no_reading,
    ) -> Path | None:
        """Find the newest checkpoint that can be trusted and set newer, damaged ones aside.

        Args:
            ranks: Those who look together, each at its share of the bytes; every rank calls this.
            read: Takes what this rank needs of a checkpoint that verifies and its manifest;
                raises DamagedError where that can't be trusted after all.

        Returns:
            Its folder, the same on every rank, or None where none was ever published.

        Raises:
            NoCheckpointError: If there are checkpoints and all of them are damaged, or one is of
                another format; they are left as they are.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(ranks.exchange(self.steps())[0]):
            reason = self._examine(self.path(step), ranks, read)
            if reason is not None:
                damaged.append((step, reason))
                continue
            self._good[step] = True
            ranks.agree(partial(self._set_aside, damaged if ranks.leads else [], step))
            return self.path(step)
        if damaged:
            reasons = "; ".join(reason for _, reason in damaged)
            raise NoCheckpointError(f"{self.folder}: every checkpoint is damaged: {reasons}")
        return None

    def newest_state(self) -> tuple[Path, dict[str, Any]] | None:
        """Read the JSON state of the newest checkpoint that has one, and change nothing.

        Returns:
            The checkpoint and its state, of which only the bytes of the state are verified; None
            where there is none.
        """
        for step in reversed(self.steps()):
            folder = self.path(step)
            try:
                check_file(folder, "state.json", read_manifest(folder))
            except DamagedError:
                continue
            return folder, read_json(folder / "state.json")
        return None

    def best_first(self) -> list[Measured]:
        """Order the checkpoints that were measured, the best one first, by their states alone.

        Returns:
            What each says, but for those that this process has found damaged.
        """
        trusted = (step for step in self.steps() if self._good.get(step) is not False)
        return best_first(map(self.path, trusted))

    def untrusted(self) -> list[int]:
        """List the steps whose checkpoint this process has found damaged, in order."""
        return [step for step in self.steps() if self._good.get(step) is False]

    def aside(self, *prefixes: str) -> list[Path]:
        """List the folders beside the checkpoints.

        Args:
            *prefixes: How the names of those begin that are wanted: some of `ASIDE`.

        Returns:
            Their paths, by name.
        """
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(entry for entry in entries if entry.name.startswith(prefixes))

    def clear_drafts(self) -> None:
        """Remove what a killed process left unpublished or half deleted."""
        for folder in self.aside(*DRAFTS):
            shutil.rmtree(folder, ignore_errors=True)

    def prune(self, retention: Retention) -> list[str]:
        """Delete old checkpoints; only those that verify count as kept.

        Args:
            retention: What stays, besides the one that measured best.

        Returns:
            A line for each thing a person should know.
        """
        notes: list[str] = []
        good = 0
        best = next((own.step for own in self.best_first() if self._is_good(own.step, notes)), None)
        for step in reversed(self.steps()):
            if good < retention.last:
                good += self._is_good(step, notes)
            elif step != best and not retention.keeps(step):
                notes += self._delete(step)
        return notes

    def branch_off(self, step: int) -> Path | None:
        """Move the checkpoints past a step out of the way, so that a run can go on from it.

        Args:
            step: The last step that stays.

        Returns:
            The folder they lie in now, or None where there were none.

        Raises:
            SaveError: If the disk refuses.
        """
        later = [s for s in self.steps() if s > step]
        if not later:
            return None
        branch = self.folder / f"branch-after-{step:08d}-{uuid.uuid4().hex[:8]}"
        try:
            branch.mkdir()
            for s in reversed(later):  # cut short by a kill, none lies beyond one that is gone
                self.path(s).rename(branch / self.path(s).name)
                reach("branch.moved")
            sync_folder(branch)
            sync_folder(self.folder)
        except OSError as error:
            raise SaveError(f"{branch}: can't be made: {error.strerror}") from error
        several = f"checkpoints of steps {later[0]} to {later[-1]}"
        what = several if len(later) > 1 else f"the checkpoint of step {later[0]}"
        self._warn(f"{what} moved to {branch.name}")
        return branch

    def _examine(
        self, folder: Path, ranks: Ranks, read: Callable[[Path, dict[str, Any]], None]
    ) -> str | None:
        """Verify and read a checkpoint together; what the first rank that met damage says of it."""

        def find(act: Callable[[], object]) -> str | None:
            try:
                act()
            except DamagedError as error:
                return str(error)
            return None

        for act in (lambda: verify(folder, ranks), lambda: read(folder, read_manifest(folder))):
            reasons = ranks.exchange(ranks.agree(partial(find, act)))
            if damage := [reason for reason in reasons if reason is not None]:
                return damage[0]
        return None

    def _delete(self, step: int) -> list[str]:
        doomed = self.folder / f"del-{self.path(step).name}-{uuid.uuid4().hex[:8]}"
        try:
            self.path(step).rename(doomed)  # first the name: half a folder is never found
            reach("prune.renamed")
            shutil.rmtree(doomed)
            reach("prune.done")
        except OSError as error:
            return [f"checkpoint {self.path(step)} can't be deleted: {error.strerror}"]
        return []

    def _set_aside(self, damaged: list[tuple[int, str]], taken: int) -> None:
        for step, reason in damaged:
            aside = self.folder / f"damaged-{self.path(step).name}-{uuid.uuid4().hex[:8]}"
            try:
                self.path(step).rename(aside)
            except OSError as error:
                raise SaveError(f"{aside}: can't be made: {error.strerror}") from error
            reach("aside.moved")
            self._warn(f"checkpoint {reason}; set aside as {aside.name}, taking step {taken}")

    def _is_good(self, step: int, notes: list[str]) -> bool:
        if step not in self._good:
            try:
                verify(self.path(step))
                self._good[step] = True
            except (DamagedError, NoCheckpointError) as error:
                notes.append(f"checkpoint {error}")
                self._good[step] = False
        return self._good[step]
