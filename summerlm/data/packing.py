"""Documents -> rows of T + 1 ids: every token of a stream is a target exactly once.

Flow: each of a lane's `Streams` has `Packer`s, which draw documents one at a time, encode them as
`BOS text EOS` and lay them back to back. A row's last id is the next row's first input, so a
row advances by T. Of the open document the ids are kept but never saved: its place and the
offset of the next id are enough to make them again.

Shapes: T targets a row, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from summerlm.data.encoding import Encoder
from summerlm.data.ledger import Counts

Place = tuple[int, int, int]  # where a document stands: epoch, ordinal of its unit, row in that


class Document(NamedTuple):
    """One document of a stream."""

    place: Place
    text: str  # never empty
    dropped: Mapping[str, int]  # rows that were passed over to reach it, by reason
    changed: Mapping[str, int]  # what rules changed in it, by rule


class Packer:
    """Lays the documents of one stream back to back and cuts rows off.

    Args:
        documents: The stream, from the open document on.
        encoder: Encodes a document.
        byte_lengths: Bytes of text that each id stands for, (V,).
        place: Place of the open document; None = the stream is at its start.
        offset: Index of the next row's first input in the open document's ids.
    """

    def __init__(
        self,
        documents: Iterator[Document],
        encoder: Encoder,
        byte_lengths: np.ndarray,
        place: Place | None = None,
        offset: int = 0,
    ) -> None:
        self.place, self.offset = place, offset
        self._documents = documents
        self._encoder, self._byte_lengths = encoder, byte_lengths
        self._ids = np.empty(0, np.int32)  # of the open document; empty until it is drawn
        self._surplus = 0  # UTF-8 bytes of its text beyond those its ids stand for

    def row(self, targets: int) -> tuple[np.ndarray, Counts]:
        """Cut the next row off the stream.

        Args:
            targets: T, how many ids of the row are targets.

        Returns:
            The ids, (T + 1,), int32, and what the row's targets account for.
        """
        self._opened = Counts()
        if not self._ids.size:
            self._open(counted=self.place is not None)
        pieces, missing, documents, text_bytes = [], targets + 1, 0, 0
        while missing:
            if self.offset == self._ids.size:
                self._open()
                self.offset = 0
            piece = self._ids[self.offset : self.offset + missing]
            self.offset += piece.size
            # a piece's first id is no target of this row, or a BOS, which stands for no text
            text_bytes += int(self._byte_lengths[piece[1:]].sum())
            if self.offset == self._ids.size and piece.size > 1:  # its EOS is a target
                documents += 1
                text_bytes += self._surplus
            missing -= piece.size
            pieces.append(piece)
        self.offset -= 1  # the last id is the next row's first input
        assert self.place is not None, "a document is open"
        counts = self._opened + Counts(targets, documents, text_bytes, self.place[0] + 1)
        return np.concatenate(pieces), counts  # (T + 1,)

    def _open(self, counted: bool = False) -> None:
        """Draw the next document; one that was counted before a resume isn't counted again."""
        self.place, text, dropped, changed = next(self._documents)
        if not counted:
            self._opened += Counts(dropped=dropped, changed=changed)
        self._ids, self._surplus = self._encoder(text)
