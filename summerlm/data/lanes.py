"""A lane: a deterministic stream of rows of its own, with a small state.

Flow: the global batch of step t is dealt by L lanes; lane l gives its rows (t B/L + j) L + l for
j in range(B/L). `loader` spreads the lanes over ranks and workers; who computes a lane changes
nothing in it, so a batch is a function of settings, data and seed alone.
    1. `DataOrder` holds all that decides the batches;
    2. `mixture.Mixture` tells which source fills the lane's next row;
    3. `walk` gives that source's documents: an epoch's units in keyed random order, of which
       lane l takes the ordinals l, l + L, ..., and a unit's rows in keyed random order;
    4. `streams.Streams` makes the row from one of the documents it keeps open;
    5. `Lane.state` says where each source stands. All else follows from that.

Shapes: B rows of T targets in the global batch, L lanes.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from summerlm.core.errors import DataChangedError, UsageError
from summerlm.data.encoding import Encoder
from summerlm.data.ledger import Counts
from summerlm.data.mixture import Mixture, rotation
from summerlm.data.packing import Document, Place
from summerlm.data.permutation import Permutation
from summerlm.data.rules.pipeline import Cleaned
from summerlm.data.shards.rows import Dropped, Row
from summerlm.data.streams import Streams
from summerlm.tokenizer.tokenizer import Tokenizer

EMPTY_EPOCHS = 100  # a lane that met no text for so long will hardly meet any


class UnitSource(Protocol):
    """What a lane needs of a source: texts by unit, and how many a unit holds."""

    @property
    def name(self) -> str:
        """Name in settings and messages, and part of the order's key."""

    @property
    def units(self) -> Sequence[int]:
        """Rows of each unit, as the lock says."""

    @property
    def chat(self) -> bool:
        """Whether its texts are dialogues for the tokenizer's chat template."""

    def read(self, unit: int) -> list[Row]:
        """Give one unit's rows."""

    def clean(self, text: str) -> Cleaned:
        """Apply the source's rules to a text, when its turn comes."""

    def find(self, unit: int, row: int) -> tuple[str, int, int]:
        """Say where a row of a unit stands: file, row group, row of the file."""

    def take_incidents(self) -> list[dict[str, Any]]:
        """Hand over what went wrong and was mended since the last call."""

    def lock(self) -> dict[str, Any]:
        """Say in plain values which data these are."""


@dataclass(frozen=True)
class DataOrder:
    """All that decides the batches of a run; plain enough to be sent to a worker.

    Args:
        sources: The sources.
        weights: Each source's share of all targets; only ratios count.
        max_epochs: Each source's number of epochs after which training stops; None = no end.
        tokenizer: Encodes the documents.
        seed: Seed of the order.
        lanes: L; divides `rows`.
        rows: B, rows of the global batch.
        context: T, targets a row.
        open_documents: Documents of a source that a lane takes rows from in turn.

    Raises:
        UsageError: If the lanes don't divide the rows or can't be dealt evenly, or a source can't
            feed every lane.
    """

    sources: Sequence[UnitSource]
    weights: Sequence[float]
    max_epochs: Sequence[int | None]
    tokenizer: Tokenizer
    seed: int
    lanes: int
    rows: int
    context: int
    open_documents: int = 1

    def __post_init__(self) -> None:
        assert len(self.sources) == len(self.weights) == len(self.max_epochs)
        if self.rows % self.lanes:
            raise UsageError(
                f"data.lanes = {self.lanes} must divide the {self.rows} rows of a batch "
                "(train.batch_tokens / model.context)"
            )
        rotation(self.lanes)  # here, so that lanes which can't be dealt evenly are refused early
        for source in self.sources:
            if not sum(source.units):
                raise UsageError(f"source {source.name}: no document to train on")
            Encoder(self.tokenizer, source.chat)  # refuses a tokenizer without chat template
            if len(source.units) < self.lanes:
                raise UsageError(
                    f"source {source.name}: {len(source.units)} units can't feed "
                    f"data.lanes = {self.lanes}; take fewer lanes"
                )

    def identity(self) -> dict[str, Any]:
        """Say in JSON values what a state belongs to; locks as a digest a key."""
        return {
            "seed": self.seed,
            "lanes": self.lanes,
            "rows": self.rows,
            "context": self.context,
            "open_documents": self.open_documents,
            "tokenizer": self.tokenizer.fingerprint,
            "sources": [source.name for source in self.sources],
            "weights": list(self.weights),
            "locks": {
                source.name: {
                    key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
                    for key, value in {**source.lock(), "units": list(source.units)}.items()
                    if key != "revision"  # a mirror doesn't know it: the files' hashes speak
                }
                for source in self.sources
            },
        }


def walk(
    source: UnitSource, limit: int | None, lane: int, order: DataOrder, place: Place
) -> Iterator[Document]:
    """Walk over the documents of one source that fall to one lane, epoch after epoch.

    Args:
        source: The source.
        limit: Epochs after which the walk ends with an error; None = never.
        lane: Lane l.
        order: Gives the seed and the number of lanes.
        place: Where to begin: (epoch, ordinal, row).

    Yields:
        The documents; rows without text, or that a rule drops, are passed over and counted.

    Raises:
        UsageError: If the epochs are used up, or the lane's units hold no text.
        DataChangedError: If a unit holds another number of rows than its lock says.
    """
    first_epoch, first_ordinal, first_row = place
    last_met, dropped = first_epoch, Counter[str]()
    for epoch in itertools.count(first_epoch):
        if limit is not None and epoch >= limit:
            raise UsageError(
                f"source {source.name}: max_epochs = {limit} is used up; allow more epochs, "
                "train on fewer tokens or lower its weight"
            )
        if epoch - last_met > EMPTY_EPOCHS:
            raise UsageError(
                f"source {source.name}: lane {lane} met no text in {EMPTY_EPOCHS} epochs; "
                "give it more text or set a smaller data.lanes"
            )
        units = Permutation(len(source.units), "units", order.seed, source.name, epoch)
        own = units(np.arange(lane, len(source.units), order.lanes))
        for ordinal in range(first_ordinal, len(own)):
            rows = _open_unit(source, int(own[ordinal]), epoch, order.seed, first_row)
            for row in range(first_row, first_row + len(rows)):
                text, changes = _clean(source, rows.pop())
                if isinstance(text, Dropped):
                    dropped[text.reason] += 1
                    continue
                yield Document((epoch, ordinal, row), text, dropped, changes)
                last_met, dropped = epoch, Counter()
            first_row = 0
        first_ordinal = 0


def _open_unit(
    source: UnitSource, unit: int, epoch: int, seed: int, first_row: int
) -> list[bytes | Dropped]:
    """Read a unit's rows in the epoch's order from a row on, the next one last.

    Texts are held as UTF-8, of which a str may take four times as much, and leave one by one.
    """
    count = source.units[unit]
    if not count:
        return []
    rows = source.read(unit)
    if len(rows) != count:
        raise DataChangedError(
            f"source {source.name}: unit {unit} holds {len(rows)} rows, its lock says {count}; "
            "restore the data or start a new run"
        )
    order = Permutation(count, "rows", seed, source.name, epoch, unit)
    wanted = (rows[index] for index in order(np.arange(first_row, count))[::-1])
    return [row if isinstance(row, Dropped) else row.encode() for row in wanted]


def _clean(source: UnitSource, row: bytes | Dropped) -> Cleaned:
    return Cleaned(row, {}) if isinstance(row, Dropped) else source.clean(row.decode())


class Lane:
    """One of the L streams of rows.

    Args:
        order: All that decides the batches.
        lane: Which lane, 0 to L - 1.
        mixture: Shares of the sources.
        state: Where to go on, as `state` gave it; None = at the start.
    """

    def __init__(
        self, order: DataOrder, lane: int, mixture: Mixture, state: dict[str, Any] | None = None
    ) -> None:
        self.number = lane
        self._order, self._mixture = order, mixture
        self._rows: int = state["rows"] if state else 0
        places = state["places"] if state else [()] * len(order.sources)
        self._streams = [
            Streams(
                partial(walk, source, limit, lane, order),
                Encoder(order.tokenizer, source.chat),
                order.tokenizer.byte_lengths,
                order.open_documents,
                place,
            )
            for source, limit, place in zip(order.sources, order.max_epochs, places, strict=True)
        ]

    def next(self) -> tuple[int, np.ndarray, Counts]:
        """Deal the lane's next row.

        Returns:
            The index of the source that fills it, the ids, (T + 1,), int32, and their account.
        """
        source = self._mixture.source(self.number, self._rows)
        self._rows += 1
        return source, *self._streams[source].row(self._order.context)

    def state(self) -> dict[str, Any]:
        """Say where the lane stands.

        Returns:
            JSON values of its own: the rows dealt, and per source what `Streams.state` says.
        """
        return {"rows": self._rows, "places": [streams.state() for streams in self._streams]}
