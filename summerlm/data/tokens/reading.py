"""Dealt steps -> training: the same batches as from the sources, by copying.

Flow: `recipes` open a folder as `Tokens`, which stands for the run's sources, and take the
steps of a rank from `TokenSteps` where they would else make a `Loader`. Every row is compared
with its checksum when it is read, so that no damaged one is trained on.

Shapes: B rows of T targets in the global batch, L lanes.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from summerlm.core.errors import DamagedDataError, UsageError
from summerlm.data.batch import Batch, batch_sha
from summerlm.data.ledger import Counts
from summerlm.data.loader import Step, check_identity
from summerlm.data.lock import read_lock
from summerlm.data.tokens.manifest import HELD_OUT, LOCK, MENDING, Shard, read_manifest


@dataclass(frozen=True)
class TokenSource:
    """What a folder of dealt steps keeps of a source besides its rows.

    Args:
        name: Its name in the settings.
        entry: Its lock.
        texts: The first of its held-out texts, each cut.
        complete: Whether these are all it has.
    """

    name: str
    entry: dict[str, Any]
    texts: list[str]
    complete: bool

    def lock(self) -> dict[str, Any]:
        """Say in plain values which data these are."""
        return self.entry

    def held_out(self) -> Iterator[str]:
        """Read the held-out texts.

        Yields:
            The texts in the source's order, each cut.

        Raises:
            UsageError: If more are asked for than were kept.
        """
        yield from self.texts
        if not self.complete:
            raise UsageError(
                f"source {self.name}: data.tokens holds no more held-out text; "
                "ask for less by validation.characters_per_source, or tokenize with more"
            )


class Tokens(Sequence[TokenSource]):
    """A folder of dealt steps; as a sequence, the sources that they come from.

    Args:
        folder: The folder.

    Attributes:
        folder: The folder.
        manifest: Its manifest.

    Raises:
        UsageError: If it is no such folder.
        DamagedDataError: If a file is missing or damaged; the rows are compared when they are read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self._read(LOCK)  # verifies it
        held_out = json.loads(self._read(HELD_OUT))
        self._sources = [
            TokenSource(entry["name"], entry, **held_out[entry["name"]])
            for entry in read_lock(folder / LOCK)
        ]

    @overload
    def __getitem__(self, index: int) -> TokenSource: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenSource]: ...

    def __getitem__(self, index: int | slice) -> TokenSource | list[TokenSource]:
        return self._sources[index]

    def __len__(self) -> int:
        return len(self._sources)

    def account(self, shard: Shard) -> dict[str, Any]:
        """Read what a shard's steps account for.

        Args:
            shard: The shard.

        Returns:
            `counts`, of each step a list by source; `lanes`, their states after the last step.

        Raises:
            DamagedDataError: If the file was altered.
        """
        account: dict[str, Any] = json.loads(self._read(shard.account))
        return account

    def state_before(self, shard: int) -> dict[str, Any]:
        """Give the state that the steps of a shard go on from.

        Args:
            shard: Its index; the number of shards means the state after the last.

        Returns:
            The state of all lanes; without any before the first step.

        Raises:
            DamagedDataError: If the file was altered.
        """
        before = self.manifest.shards[shard - 1] if shard else None
        return {
            "data": self.manifest.identity,
            "step": before.last if before else 0,
            "lanes": self.account(before)["lanes"] if before else {},
        }

    def rows(self, shard: Shard) -> NDArray[np.void]:
        """Map a shard's rows into memory.

        Args:
            shard: The shard.

        Returns:
            The rows in global order, (steps * B,), of the manifest's `row_type`.

        Raises:
            DamagedDataError: If the file is gone or was cut since the folder was opened.
        """
        path = self.folder / shard.rows
        shape = ((shard.last - shard.first + 1) * self.manifest.identity["rows"],)
        try:
            return np.memmap(path, self.manifest.row_type, mode="r", shape=shape)
        except (OSError, ValueError) as error:
            raise DamagedDataError(f"{path}: can't be read: {error}; {MENDING}") from None

    def _read(self, name: str) -> bytes:
        """Read a file, verified."""
        path = self.folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DamagedDataError(f"{path}: {error.strerror}; {MENDING}") from None
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise DamagedDataError(f"{path}: its SHA-256 is not the manifest's; {MENDING}")
        return data


class TokenSteps(Iterator[Step]):
    """Gives the dealt steps to one rank, as a `Loader` would.

    A step's state has the lanes as they stood before the step's shard: from there a `Loader` can
    deal up to the step again. What a step accounts for beyond its targets (documents, bytes, rows
    passed over) is known of the whole batch only: rank 0 bears it, so that sums over ranks hold.

    Args:
        tokens: The folder.
        bos: The id of BOS.
        state: State of the step to go on after; None = start.
        rank: This process among `world`.
        world: Number of ranks; divides the lanes.

    Attributes:
        lane_rows: Rows of a lane in each step.

    Raises:
        UsageError: If `world` doesn't divide the lanes.
        DataChangedError: If the state was made with other data or another order.
    """

    def __init__(
        self,
        tokens: Tokens,
        bos: int,
        *,
        state: dict[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        identity = tokens.manifest.identity
        if identity["lanes"] % world:
            raise UsageError(f"the world size {world} must divide data.lanes = {identity['lanes']}")
        if state is not None:
            check_identity(state["data"], identity)
        self.lane_rows: int = identity["rows"] // identity["lanes"]
        self._tokens, self._bos = tokens, bos
        self._rank, self._world = rank, world
        self._steps: int = state["step"] if state is not None else 0
        self._open: _OpenShard | None = None

    def __next__(self) -> Step:
        """Give the next step.

        Returns:
            The step.

        Raises:
            UsageError: If the folder holds no more.
            DamagedDataError: If a file of it is damaged.
        """
        number = self._steps + 1
        if self._open is None or number > self._open.shard.last:
            self._open = self._open_shard(number)
        rows = self._read(self._open, number)
        ids = rows["ids"].astype(np.int32)  # (B / world, T + 1)
        sources = rows["source"].astype(np.int64)  # (B / world,)
        batch = Batch.from_ids(ids, sources, self._bos)
        self._steps = number
        return Step(
            number=number,
            ids=ids,
            batch=batch.pin() if torch.cuda.is_available() else batch,
            sha=batch_sha(ids, batch.documents.numpy()),
            state={**json.loads(self._open.state), "step": number},
            source_counts=self._count(self._open, number, sources),
            incidents=[],
        )

    def close(self) -> None:
        """Let go of the open file."""
        self._open = None

    def _open_shard(self, number: int) -> "_OpenShard":
        tokens = self._tokens
        shards, steps = tokens.manifest.shards, tokens.manifest.steps
        if number > steps:
            raise UsageError(
                f"{tokens.folder}: holds {steps} steps, step {number} is asked for; "
                "let `summerlm data tokenize` add some"
            )
        index = bisect_left([shard.last for shard in shards], number)
        shard, state = shards[index], tokens.state_before(index)
        own = range(self._rank, tokens.manifest.identity["lanes"], self._world)
        lanes = {str(lane): state["lanes"][str(lane)] for lane in own if state["lanes"]}
        return _OpenShard(
            shard,
            tokens.rows(shard),
            tokens.account(shard)["counts"],
            json.dumps({**state, "lanes": lanes}),
        )

    def _read(self, opened: "_OpenShard", number: int) -> NDArray[np.void]:
        """Copy this rank's rows of a step, (B / world,)."""
        manifest, shard = self._tokens.manifest, opened.shard
        B = manifest.identity["rows"]
        numbers = range((number - 1) * B + self._rank, number * B, self._world)
        first = (shard.first - 1) * B
        rows = np.array(opened.rows[numbers.start - first : numbers.stop - first : self._world])
        damaged = rows["check"] != manifest.checksums(rows, numbers)
        if damaged.any():
            row = numbers[int(damaged.argmax())] - first
            path = self._tokens.folder / shard.rows
            raise DamagedDataError(f"{path}: row {row} (of step {number}) is damaged; {MENDING}")
        return rows

    def _count(
        self, opened: "_OpenShard", number: int, sources: NDArray[np.int64]
    ) -> dict[str, Counts]:
        """Give this rank's part of what a step accounts for."""
        identity = self._tokens.manifest.identity
        rows = np.bincount(sources, minlength=len(identity["sources"])).tolist()
        counts = [Counts(*values) for values in opened.counts[number - opened.shard.first]]
        return {
            name: replace(whole if self._rank == 0 else Counts(), targets=n * identity["context"])
            for name, whole, n in zip(identity["sources"], counts, rows, strict=True)
        }


@dataclass(frozen=True)
class _OpenShard:
    """A shard that is being read, and the state before it as JSON, with the rank's lanes."""

    shard: Shard
    rows: NDArray[np.void]
    counts: list[list[list[Any]]]
    state: str
