"""Which documents a row holds: said only when someone asks, by dealing its lane once more.

Flow: `recipes` ask `follow` for the rows that a spike came of. A lane is a function of its state,
so `deal_again` deals it from any state before those rows and watches which documents are opened;
`follow` goes on until the documents end, and `name_document` says where they stand.

Shapes: B rows of a batch, L lanes, J = B / L rows a lane and step, T targets a row.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from summerlm.data.encoding import Encoded, Encoder
from summerlm.data.lanes import DataOrder, walk
from summerlm.data.mixture import Mixture
from summerlm.data.packing import Document, Place
from summerlm.data.permutation import Permutation
from summerlm.data.streams import Streams

STEPS_AHEAD = 64  # how far a document is followed

Key = tuple[int, Place]  # a document of a lane: index of its source, place


class Name(NamedTuple):
    """What a person needs to find a document."""

    source: str
    file: str
    group: int  # row group of the file
    row: int  # of the whole file, from 0


@dataclass(frozen=True)
class Held:
    """What one row holds.

    Attributes:
        documents: The documents of which a target stands in it, in order.
        goes_on: The document at its end, if that has targets in later rows.
    """

    documents: tuple[Key, ...]
    goes_on: Key | None


@dataclass(frozen=True)
class Followed:
    """Rows, all that follow them with pieces of the same documents, and these documents.

    Attributes:
        rows: Step and global row of each, in order.
        documents: The documents, lane by lane.
        open_ends: How many of them go on beyond the steps that were looked at.
    """

    rows: list[tuple[int, int]]
    documents: list[Name]
    open_ends: int


def follow(
    order: DataOrder, lanes: Mapping[str, Any], step: int, rows: Iterable[int], last_step: int
) -> Followed:
    """Name the documents of some rows, and find the later rows that hold pieces of them.

    Args:
        order: All that decides the batches.
        lanes: Where the lanes stood before the step, or earlier: their states by number as text;
            empty for the start.
        step: The step.
        rows: Rows of its batch, in global order.
        last_step: The run's last step; at most `STEPS_AHEAD` steps after this one are looked at.

    Returns:
        These rows and those that follow them, with their documents.

    Raises:
        SummerError: What a lane may meet.
    """
    L, last = order.lanes, min(last_step, step + STEPS_AHEAD)
    by_lane: defaultdict[int, set[int]] = defaultdict(set)
    for row in rows:
        by_lane[row % L].add(row)
    found: list[tuple[int, int]] = []
    documents: list[Name] = []
    open_ends = 0
    for lane in sorted(by_lane):
        wanted: dict[Key, None] = {}  # a set that keeps its order
        unfinished: set[Key] = set()
        asked = {(step, row) for row in by_lane[lane]}
        for place, held in _places(order, lane, lanes.get(str(lane)), last):
            if place in asked:
                wanted |= dict.fromkeys(held.documents)
            if not wanted.keys().isdisjoint(held.documents):
                found.append(place)
            unfinished -= set(held.documents)
            if held.goes_on in wanted:
                unfinished.add(held.goes_on)
            if not unfinished and place >= max(asked):
                break
        open_ends += len(unfinished)
        documents += [name_document(order, lane, key) for key in wanted]
    return Followed(sorted(found), documents, open_ends)


def _places(
    order: DataOrder, lane: int, state: Mapping[str, Any] | None, last_step: int
) -> Iterator[tuple[tuple[int, int], Held]]:
    """Yield a lane's rows from a state to a last step: step, global row, and what it holds."""
    J = order.rows // order.lanes
    numbers = range(state["rows"] if state else 0, last_step * J)
    for number, held in zip(numbers, deal_again(order, lane, state), strict=False):
        yield (number // J + 1, number % J * order.lanes + lane), held


def deal_again(order: DataOrder, lane: int, state: Mapping[str, Any] | None) -> Iterator[Held]:
    """Deal a lane again and say what each of its rows holds.

    Args:
        order: All that decides the batches.
        lane: Which lane, 0 to L - 1.
        state: Where to begin, as `Lane.state` gave it; None = at the start.

    Yields:
        What the row after the state holds, then the next, without end.

    Raises:
        SummerError: What a lane may meet.
    """
    mixture = Mixture(order.weights, order.lanes, order.seed)
    dealt: int = state["rows"] if state else 0
    places = state["places"] if state else [()] * len(order.sources)
    watched = [_Watched(order, lane, i, place) for i, place in enumerate(places)]
    while True:
        yield watched[mixture.source(lane, dealt)].row()
        dealt += 1


class _Watched(Encoder):
    """The streams of one lane and source, which tell what is opened and how long it is."""

    def __init__(self, order: DataOrder, lane: int, source: int, places: list[list[int]]) -> None:
        super().__init__(order.tokenizer, order.sources[source].chat)
        self._order, self._lane, self._source = order, lane, source
        self._drawn: list[Place] = []  # by the row that is being dealt
        self._sizes: dict[Place, int] = {}
        lengths, count = order.tokenizer.byte_lengths, order.open_documents
        self._streams = Streams(self._walk, self, lengths, count, places)

    def row(self) -> Held:
        """Deal the next row, and lay out again what the packer laid into it."""
        count, before = self._order.open_documents, self._streams.state()
        self._drawn.clear()
        self._streams.row(self._order.context)
        drawn = [(place, 0) for place in self._drawn]
        if len(before) == count:  # else one that wasn't open yet has dealt
            epoch, ordinal, row, offset = before[0]
            place = (epoch, ordinal, row)
            drawn = [(place, offset), *(d for d in drawn if d[0] != place)]  # it is drawn anew once
        documents, filled, length = [], 0, self._order.context + 1
        for place, start in drawn:
            size = min(self._sizes[place] - start, length - filled)
            # the row's first id is no target of this row, and a BOS none at all
            if size > (filled == 0 or start == 0):
                documents.append((self._source, place))
            filled += size
        open_ = (self._source, place) if start + size < self._sizes[place] else None
        return Held(tuple(documents), open_)

    def _walk(self, place: Place) -> Iterator[Document]:
        order, source = self._order, self._source
        limit = order.max_epochs[source]
        for document in walk(order.sources[source], limit, self._lane, order, place):
            self._drawn.append(document.place)
            yield document

    def __call__(self, document: str) -> Encoded:
        """Encode the document that was drawn last."""
        encoded = super().__call__(document)
        self._sizes[self._drawn[-1]] = encoded.ids.size
        return encoded


def name_document(order: DataOrder, lane: int, key: Key) -> Name:
    """Say where a document stands.

    Args:
        order: All that decides the batches.
        lane: The lane that deals it.
        key: The document, as `deal_again` tells it.

    Returns:
        Its source, file, row group and row.
    """
    index, (epoch, ordinal, row) = key
    source = order.sources[index]
    units = Permutation(len(source.units), "units", order.seed, source.name, epoch)
    unit = int(units(np.array([lane + ordinal * order.lanes]))[0])
    rows = Permutation(source.units[unit], "rows", order.seed, source.name, epoch, unit)
    return Name(source.name, *source.find(unit, int(rows(np.array([row]))[0])))
