"""The open documents of one lane and source: rows come from each in turn.

Flow: `lanes.Lane` has one `Streams` a source, which has as many `packing.Packer`s as the settings
keep documents open. All draw their next document from one `walk`, so an epoch still reads every
document once; only the rows of neighbouring documents alternate. Where one document fills many
rows, neighbouring steps of a small batch would otherwise train on the same few documents.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from summerlm.data.encoding import Encoder
from summerlm.data.ledger import Counts
from summerlm.data.packing import Document, Packer, Place

Walk = Callable[[Place], Iterator[Document]]  # from a place on, the document there included


class Streams:
    """Deals the rows of one lane and source.

    Args:
        walk: Gives the documents from a place on.
        encoder: Encodes them.
        byte_lengths: Bytes of text that each id stands for, (V,).
        count: Documents that are kept open.
        state: Where to go on, as `state` gave it; empty = at the start.
    """

    def __init__(
        self,
        walk: Walk,
        encoder: Encoder,
        byte_lengths: np.ndarray,
        count: int,
        state: Sequence[Sequence[int]],
    ) -> None:
        assert len(state) <= count
        self._walk = walk
        epoch, ordinal, row = max((tuple(place[:3]) for place in state), default=(0, 0, -1))
        documents = walk((epoch, ordinal, row + 1))  # drawn by whichever packer needs one
        packer = partial(Packer, encoder=encoder, byte_lengths=byte_lengths)
        unopened = [packer(documents) for _ in range(count - len(state))]
        opened = [
            packer(
                itertools.chain(self._again((e, o, r)), documents), place=(e, o, r), offset=offset
            )
            for e, o, r, offset in state
        ]
        self._packers = deque(unopened + opened)  # the next to deal comes first

    def row(self, targets: int) -> tuple[np.ndarray, Counts]:
        """Cut the next row.

        Args:
            targets: T, how many ids of the row are targets.

        Returns:
            The ids, (T + 1,), int32, and what the row's targets account for.
        """
        packer = self._packers[0]
        self._packers.rotate(-1)
        return packer.row(targets)

    def state(self) -> list[list[int]]:
        """Say where the open documents stand.

        Returns:
            JSON values of its own, the next to deal first: epoch, ordinal and row of each open
            document and the offset of the next id in it. Those not yet opened come before these
            and are left out.
        """
        return [[*p.place, p.offset] for p in self._packers if p.place is not None]

    def _again(self, place: Place) -> Iterator[Document]:
        """Draw the open document of a place, and none after it."""
        yield next(self._walk(place))
