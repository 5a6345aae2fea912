"""The stages of the data chain one at a time: read, tokenize, pack.

Each works on the same texts of one source, a fixed sample of its units in random order; what the
stage before makes is ready in memory. All are measured in ids of these texts, BOS and EOS
included.
"""

import random
import time
from collections.abc import Callable, Iterable
from typing import Any

from summerlm.data.encoding import Encoded, Encoder
from summerlm.data.packing import Document, Packer
from summerlm.data.shards.rows import Dropped
from summerlm.data.sources import Source
from summerlm.tokenizer.tokenizer import Tokenizer


class Stages:
    """The stages of one source.

    Args:
        source: The source.
        tokenizer: Its tokenizer.
        context: T, targets of a packed row.
        tokens: Ids to work on, at least.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, context: int, tokens: int) -> None:
        self.name = source.name
        self._source, self._context = source, context
        self._encoder = Encoder(tokenizer, source.chat)
        self._byte_lengths = tokenizer.byte_lengths
        units = random.Random(0).sample(range(len(source.units)), len(source.units))
        self._units: list[int] = []
        self._texts: list[str] = []
        self._encoded: list[Encoded] = []
        while units and self._tokens < tokens:
            self._units.append(units.pop())
            texts = [row for row in source.read(self._units[-1]) if not isinstance(row, Dropped)]
            self._texts += texts
            self._encoded += map(self._encoder, texts)

    def once(self) -> dict[str, Any]:
        """Go through each stage once.

        Returns:
            The ids worked on, and each stage's seconds.
        """
        return {
            "tokens": self._tokens,
            "read": _seconds(self._read),
            "tokenize": _seconds(self._tokenize),
            "pack": _seconds(self._pack),
        }

    @property
    def _tokens(self) -> int:
        return sum(encoded.ids.size for encoded in self._encoded)

    def _read(self) -> None:
        for unit in self._units:
            self._source.read(unit)

    def _tokenize(self) -> None:
        for text in self._texts:
            self._encoder(text)

    def _pack(self) -> None:
        documents = (Document((0, 0, row), text, {}, {}) for row, text in enumerate(self._texts))
        packer = Packer(documents, Ready(self._encoded), self._byte_lengths)
        for _ in range((self._tokens - 1) // self._context):
            packer.row(self._context)


class Ready(Encoder):
    """Stands in for the encoder where ids are ready."""

    def __init__(self, encoded: Iterable[Encoded]) -> None:
        self._encoded = iter(encoded)

    def __call__(self, document: str) -> Encoded:
        """Give the next document's ids."""
        return next(self._encoded)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
