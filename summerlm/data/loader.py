"""Lanes over ranks and workers: the steps of a run, made ahead, resumable after each.

Flow:
    1. `Loader` gives its rank the lanes l with l % world == rank, and `workers` deal them ahead;
    2. it puts the parts of a step together in global row order as a `Step`: batch, hash, counts,
       and the state after exactly this step, however far the workers are ahead;
    3. `train` consumes steps and saves a step's state; `merge_states` joins those of all ranks;
    4. `hash_ranks` and `hash_steps` audit: what all ranks of a world train on.

Shapes: B rows of T positions in the global batch, L lanes, J = B / L rows a lane and step.
"""

import copy
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from summerlm.core.errors import DataChangedError, SummerError, UsageError, WorkerDiedError
from summerlm.data.batch import Batch, batch_sha
from summerlm.data.lanes import DataOrder, UnitSource
from summerlm.data.ledger import Counts
from summerlm.data.workers import Part, Share, end, start
from summerlm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Step:
    """One step's data, as one rank gets them.

    Args:
        number: The step, from 1.
        ids: The rank's rows in global row order, (B / world, T + 1), int32.
        batch: The same as tensors; pinned where there is a GPU.
        sha: `batch_sha` of the rank's rows.
        state: Where the rank's lanes stand after this step; JSON values, shared with nobody.
        source_counts: What each source gave to the rank's rows.
        incidents: What went wrong and was mended while the rank's rows were made.
    """

    number: int
    ids: np.ndarray
    batch: Batch
    sha: str
    state: dict[str, Any]
    source_counts: dict[str, Counts]
    incidents: list[dict[str, Any]]

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """Targets of each source, ignored ones included."""
        return {name: counts.targets for name, counts in self.source_counts.items()}


class Steps(Protocol):
    """The steps of a run for one rank: dealt by a `Loader`, or read where one dealt them before."""

    lane_rows: int

    def __iter__(self) -> Iterator[Step]: ...

    def __next__(self) -> Step:
        """Give the next step."""

    def close(self) -> None:
        """Stop for good."""


class Loader(Iterator[Step]):
    """Deals the steps of a run to one rank, without end, until it is closed.

    Workers import the main module again: a script of one's own that makes a loader with workers
    does it under `if __name__ == "__main__"`.

    Args:
        sources: The sources.
        weights: Each source's share of all targets; only ratios count.
        tokenizer: Encodes the documents.
        seed: Seed of the order.
        lanes: Number of lanes L.
        rows: B, rows of the global batch.
        context: T, targets a row.
        workers: Processes that make the batches; 0 = this one, while it waits.
        prefetch_steps: Steps that the workers are ahead.
        max_epochs: Each source's epochs after which the steps end with an error; None = never.
        open_documents: Documents of a source that a lane takes rows from in turn.
        state: State of the step to go on after, of all lanes of this rank; None = start.
        rank: This process among `world`.
        world: Number of ranks; divides the lanes.

    Attributes:
        order: All that decides its batches.
        identity: The order as states name it.
        lane_rows: J, rows of a lane in each step.

    Raises:
        UsageError: If `world`, `lanes` and `rows` don't divide one another, or a source can't
            feed every lane.
        DataChangedError: If the state was made with other data or another order.
    """

    def __init__(
        self,
        sources: Sequence[UnitSource],
        weights: Sequence[float],
        tokenizer: Tokenizer,
        *,
        seed: int,
        lanes: int,
        rows: int,
        context: int,
        workers: int,
        prefetch_steps: int,
        max_epochs: Sequence[int | None] | None = None,
        open_documents: int = 1,
        state: dict[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if lanes % world:
            raise refuse_world(world, lanes)
        limits = max_epochs or [None] * len(sources)
        order = DataOrder(
            sources, weights, limits, tokenizer, seed, lanes, rows, context, open_documents
        )
        self.order, self.identity, self.lane_rows = order, order.identity(), rows // lanes
        if state is not None:
            check_identity(state["data"], self.identity)
            dealt = {lane["rows"] for lane in state["lanes"].values()} or {0}
            assert dealt == {state["step"] * self.lane_rows}, "lanes of an earlier step"
        self._steps: int = state["step"] if state is not None else 0
        own = range(rank, lanes, world)
        share = Share(order, own, state["lanes"] if state is not None else None)
        self._parts, self._workers = start(share, min(workers, len(own)), prefetch_steps)

    def __next__(self) -> Step:
        """Give the next step.

        Returns:
            The step.

        Raises:
            SummerError: What a worker met: the same error, at the step where it happened.
        """
        parts = [self._receive() for _ in range(max(len(self._workers), 1))]
        states = {lane: state for part in parts for lane, state in part.states.items()}
        ids = _interleave([part.ids for part in parts])  # (B / world, T + 1)
        sources = _interleave([part.sources for part in parts])  # (B / world,)
        batch = Batch.from_ids(ids, sources, self.order.tokenizer.bos)
        self._steps += 1
        return Step(
            number=self._steps,
            ids=ids,
            batch=batch.pin() if torch.cuda.is_available() else batch,
            sha=batch_sha(ids, batch.documents.numpy()),
            state={
                "data": copy.deepcopy(self.identity),
                "step": self._steps,
                "lanes": {str(lane): states[lane] for lane in sorted(states)},
            },
            source_counts={
                source.name: sum((part.counts[i] for part in parts), Counts())
                for i, source in enumerate(self.order.sources)
            },
            incidents=[*self._take_incidents(), *(i for part in parts for i in part.incidents)],
        )

    def close(self) -> None:
        """Stop the workers."""
        end(self._workers)
        if hasattr(self._parts, "_workers_done_event"):
            # a worker may have died with the lock of the event, for which torch would wait
            self._parts._workers_done_event = multiprocessing.Event()
        self._parts = iter(())

    def _take_incidents(self) -> Iterator[dict[str, Any]]:
        """Hand over what this process met beside workers, as when it opened the sources."""
        for source in self.order.sources:
            yield from source.take_incidents()

    def _receive(self) -> Part:
        try:
            part = next(self._parts)
        except RuntimeError as error:
            if all(worker.is_alive() for worker in self._workers):
                raise
            raise WorkerDiedError(
                f"a data worker died ({error}); look for an out-of-memory kill, or set "
                "data.workers=0 to see it fail in this process"
            ) from None
        if isinstance(part, SummerError):
            raise part
        return part


def refuse_world(world: int, lanes: int) -> UsageError:
    """Say which worlds could share the lanes."""
    sizes = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
    return UsageError(f"the world size {world} must divide data.lanes = {lanes}: {sizes}")


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the states of all ranks after one step, for a world of any size to go on from.

    Args:
        states: The state of each rank, after the same step.

    Returns:
        The state of all lanes.
    """
    first = states[0]
    assert all((s["data"], s["step"]) == (first["data"], first["step"]) for s in states)
    lanes = {lane: state for s in states for lane, state in s["lanes"].items()}
    assert len(lanes) == sum(len(s["lanes"]) for s in states), "a lane belongs to one rank"
    return {**first, "lanes": {lane: lanes[lane] for lane in sorted(lanes, key=int)}}


def hash_steps(loaders: Sequence[Steps]) -> Iterator[tuple[int, str]]:
    """Audit a world: the number and the global `batch_sha` of each step.

    Args:
        loaders: The loader of each rank, in order; they are consumed.

    Yields:
        Number and hash of each step, without end.
    """
    for steps in zip(*loaders, strict=True):
        ids, borders = zip(*((s.ids, s.batch.documents.numpy()) for s in steps), strict=True)
        yield steps[0].number, hash_ranks(ids, borders, loaders[0].lane_rows)


def hash_ranks(ids: Sequence[np.ndarray], borders: Sequence[np.ndarray], lane_rows: int) -> str:
    """Give the `batch_sha` of the global batch.

    Args:
        ids: Each rank's ids, (B / world, T + 1), by rank.
        borders: Each rank's document counts, (B / world, T), by rank.
        lane_rows: J, rows of a lane in each step.

    Returns:
        The SHA-256 in hexadecimal.
    """
    parts = ([_by_turn(rows, lane_rows) for rows in ranks] for ranks in (ids, borders))
    return batch_sha(*map(_interleave, parts))


def _by_turn(rows: np.ndarray, turns: int) -> np.ndarray:
    """Separate the turns in which lanes dealt their rows: (B, ...) to (J, B / J, ...)."""
    return rows.reshape(turns, -1, *rows.shape[1:])


def _interleave(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Deal rows of several parts in turn.

    Args:
        parts: K arrays, (J, n, ...), of which part p holds the lanes p, p + K, p + 2K, ...; n
            may differ by one.

    Returns:
        All rows in global order, (J * lanes, ...).
    """
    turns, _, *row = parts[0].shape
    lanes = sum(part.shape[1] for part in parts)
    merged = np.empty((turns, lanes, *row), parts[0].dtype)
    for index, part in enumerate(parts):
        merged[:, index :: len(parts)] = part
    return merged.reshape(turns * lanes, *row)


def check_identity(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse a state of other data.

    Args:
        saved: The identity in the state.
        current: That of the data at hand.

    Raises:
        DataChangedError: If they differ; the message names every difference.
    """
    old, new = _flat(saved), _flat(current)
    lines = [
        f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    if lines:
        raise DataChangedError(
            f"the checkpoint's data are not this run's: {'; '.join(lines)}; "
            "restore them or start a new run"
        )


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in identity.items() if key != "locks"}
    for name, lock in identity["locks"].items():
        flat |= {f"source {name}: {key}": digest for key, digest in lock.items()}
    return flat
