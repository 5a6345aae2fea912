"""Documents -> rows of T + 1 ids: every token of a stream is a target exactly once.

Flow: each of a lane's `Streams` has `Packer`s, which draw documents one at a time, encode them as
`BOS text EOS` and lay them back to back. A row's last id is the next row's first input, so a
row advances by T. Of the open document the ids are kept but never saved: its place and the
offset of the next id are enough to make them again.

Shapes: T targets a row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from summerlm.data.ledger import Counts
from summerlm.tokenizer.tokenizer import Tokenizer

Place = tuple[int, int, int]  # where a document stands: epoch, ordinal of its unit, row in that


class Document(NamedTuple):
    """One document of a stream."""

    place: Place
    text: str  # never empty
    skipped: int  # rows without text that were passed over to reach it


class Packer:
    """Lays the documents of one stream back to back and cuts rows off.

    Args:
        documents: The stream, from the open document on.
        tokenizer: Encodes a document.
        place: Place of the open document; None = the stream is at its start.
        offset: Index of the next row's first input in the open document's ids.
    """

    def __init__(
        self,
        documents: Iterator[Document],
        tokenizer: Tokenizer,
        place: Place | None = None,
        offset: int = 0,
    ) -> None:
        self.place, self.offset = place, offset
        self._documents = documents
        self._tokenizer = tokenizer
        self._ids = np.empty(0, np.int32)  # of the open document; empty until it is drawn
        self._surplus = 0  # UTF-8 bytes of its text beyond those its ids stand for

    def row(self, targets: int) -> tuple[np.ndarray, Counts]:
        """Cut the next row off the stream.

        Args:
            targets: T, how many ids of the row are targets.

        Returns:
            The ids, (T + 1,), int32, and what the row's targets account for.
        """
        self._skipped = 0
        if not self._ids.size:
            self._open()
        pieces, missing, text_bytes = [], targets + 1, 0
        while missing:
            if self.offset == self._ids.size:
                self._open()
                self.offset = 0
            piece = self._ids[self.offset : self.offset + missing]
            self.offset += piece.size
            # a piece's first id is no target of this row, or a BOS, which stands for no text
            text_bytes += int(self._tokenizer.byte_lengths[piece[1:]].sum())
            if self.offset == self._ids.size and piece.size > 1:
                text_bytes += self._surplus  # settled where EOS is a target
            missing -= piece.size
            pieces.append(piece)
        self.offset -= 1  # the last id is the next row's first input
        ids = np.concatenate(pieces)  # (T + 1,)
        documents = int((ids[1:] == self._tokenizer.eos).sum())
        assert self.place is not None, "a document is open"
        return ids, Counts(targets, documents, text_bytes, self._skipped, self.place[0] + 1)

    def _open(self) -> None:
        self.place, text, skipped = next(self._documents)
        self._skipped += skipped
        bos, eos = self._tokenizer.bos, self._tokenizer.eos
        self._ids = np.array([bos, *self._tokenizer.encode(text), eos], np.int32)
        assert bos not in self._ids[1:], "text may never encode to a special id"
        # a tokenizer may put a space before a text
        self._surplus = len(text.encode()) - int(self._tokenizer.byte_lengths[self._ids].sum())
