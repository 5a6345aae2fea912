"""What each protocol asks a model for: which streams it reads, in which windows, and its divisors.

Flow: `protocols` has four of them made of a `Corpus`, scores what they ask for, and makes
`FIGURES` of the sums. docs/evaluation.md has each protocol's formula and source.

Shapes: U units (documents; blocks of the original's).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from summerlm.eval.bootstrap import Floats
from summerlm.eval.corpus import Corpus
from summerlm.eval.wikitext import count_words
from summerlm.eval.windows import Window, blocks, rolling, strided
from summerlm.tokenizer.tokenizer import Tokenizer

ORIGINAL_BLOCK = 2048  # tokens; the original's evaluation, whatever its model could read
ORIGINAL_ROWS = 1000  # rows joined at once: what they leave over is dropped
ORIGINAL_BATCH = 8  # blocks whose mean is taken before the mean of batches

PROTOCOLS = {
    "original": "blocks without BOS, lines stripped and joined, as the original SummerLM's",
    "sliding": "one text, a window that slides, as Hugging Face's guide",
    "rolling": "by document, whole windows, detokenized, as lm-eval's wikitext",
    "raw": "by document, windows that overlap, the text as it is",
}
"""What is measured, by the name that figures are printed under, in this order."""

COLUMNS = ("nats", "tokens", "words", "bytes")
NATS, TOKENS, WORDS, BYTES = range(len(COLUMNS))


class Figure(NamedTuple):
    """How a figure is made of totals: `finish` of nats a token, word or byte."""

    column: int
    finish: Callable[[Floats], Floats]

    def of(self, totals: Floats) -> Floats:
        """Make totals, (R, 4), into figures, (R,)."""
        return self.finish(totals[:, NATS] / totals[:, self.column])


FIGURES = {
    "perplexity": Figure(TOKENS, np.exp),
    "word_perplexity": Figure(WORDS, np.exp),
    "byte_perplexity": Figure(BYTES, np.exp),
    "bits_per_byte": Figure(BYTES, lambda nats: nats / math.log(2)),
}
"""What figures there are, by name."""


@dataclass
class Plan:
    """What a protocol asks a model for.

    Attributes:
        protocol: Its name.
        figures: Names of the figures that it gives.
        sizes: What nats are divided by, (U, 4), by the columns above; the nats still 0.
        settings: As in `ProtocolScore`.
        unit: What the units are: "documents" or "blocks".
        notes: As in `ProtocolScore`.
        asked: (stream, window, unit or the unit of each id of the stream).
    """

    protocol: str
    figures: tuple[str, ...]
    sizes: Floats
    settings: dict[str, int]
    unit: str = "documents"
    notes: tuple[str, ...] = ()
    asked: list[tuple[int, Window, int | NDArray[np.int64]]] = field(default_factory=list)


class Streams:
    """Ids of texts, each text encoded once; BOS in front.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[Tensor] = []
        self._number: dict[str, int] = {}

    def of(self, text: str) -> int:
        """Give the number of a text's stream."""
        if text not in self._number:
            ids = self.tokenizer.encode_array(text)
            self._number[text] = self.add(np.concatenate(([self.tokenizer.bos], ids)))
        return self._number[text]

    def add(self, ids: NDArray[np.integer]) -> int:
        """Take ids as they are for a stream; gives its number."""
        self.ids.append(torch.from_numpy(ids.astype(np.int32)))
        return len(self.ids) - 1


def original_plan(corpus: Corpus, streams: Streams, context: int) -> Plan:
    """Plan the original's protocol: whole blocks of stripped lines, joined without a space.

    Args:
        corpus: The text.
        streams: Takes the ids.
        context: What the model reads at most, in tokens.

    Returns:
        The plan; its units are blocks.

    Source:
        benchmark.py of the original SummerLM; dropout, which stayed on there, is off here.
    """
    block, notes = min(ORIGINAL_BLOCK, context), tuple[str, ...]()
    if block < ORIGINAL_BLOCK:
        notes = (f"blocks of {block}, the model's context, where the original's have 2048",)
    rows = [ids for ids in streams.tokenizer.encode_batch(corpus.lines) if len(ids) > 1]
    plan = Plan("original", ("perplexity",), np.zeros((0, 4)), {"block": block}, "blocks", notes)
    for start in range(0, len(rows), ORIGINAL_ROWS):
        ids = np.concatenate([np.array(row) for row in rows[start : start + ORIGINAL_ROWS]])
        stream = streams.add(ids)
        for window in blocks(len(ids), block):
            plan.asked.append((stream, window, len(plan.asked)))
    plan.sizes = np.zeros((len(plan.asked), 4))
    plan.sizes[:, TOKENS] = block - 1
    if not plan.asked:
        plan.notes += (f"not one block of {block} tokens",)
    return plan


def sliding_plan(corpus: Corpus, streams: Streams, context: int, stride: int) -> Plan:
    """Plan a window that slides over all rows as one text; a token's unit is its document.

    Args:
        corpus: The text.
        streams: Takes the ids.
        context: Tokens of a window.
        stride: Tokens from one window's beginning to the next one's.

    Returns:
        The plan.

    Source:
        Hugging Face transformers, docs, "Perplexity of fixed-length models".
    """
    stream = streams.of(corpus.joined)
    ids, tokenizer = streams.ids[stream].numpy(), streams.tokenizer
    # where each token begins in the text's bytes tells its document
    begins = np.cumsum(tokenizer.byte_lengths[ids]) - tokenizer.byte_lengths[ids]
    units = np.searchsorted(corpus.ends, begins - tokenizer.space_in_front, side="right")
    units = units.clip(0, len(corpus.documents) - 1)
    sizes = np.zeros((len(corpus.documents), 4))
    settings = {"context": context, "stride": stride}
    plan = Plan("sliding", ("perplexity",), sizes, settings)
    for window in strided(len(ids), context, stride):
        plan.asked.append((stream, window, units))
        np.add.at(sizes[:, TOKENS], units[window.first + 1 : window.end + 1], 1)
    return plan


def rolling_plan(corpus: Corpus, streams: Streams, context: int) -> Plan:
    """Plan to read each document by itself, detokenized, in windows of the whole context.

    Args:
        corpus: The text.
        streams: Takes the ids.
        context: What the model reads at most, in tokens.

    Returns:
        The plan.

    Source:
        lm-eval, lm_eval/tasks/wikitext and loglikelihood_rolling of lm_eval/models/huggingface.py.
    """
    texts = list(map(corpus.detokenize or str, corpus.documents))
    figures = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    plan = _by_document("rolling", figures, texts, corpus, streams, context, context)
    # of the documents, not of what the model reads of them: so lm-eval
    plan.sizes[:, WORDS] = [count_words(text) for text in corpus.documents]
    return plan


def raw_plan(corpus: Corpus, streams: Streams, context: int, stride: int) -> Plan:
    """Plan to read each document by itself, as it is; the same windows as `text.measure`.

    Args:
        corpus: The text.
        streams: Takes the ids.
        context: What the model reads at most, in tokens.
        stride: Tokens that a window but the first is asked for.

    Returns:
        The plan.
    """
    figures, texts = ("bits_per_byte", "perplexity"), corpus.documents
    return _by_document("raw", figures, texts, corpus, streams, context, stride)


def _by_document(
    protocol: str,
    figures: tuple[str, ...],
    texts: Sequence[str],
    corpus: Corpus,
    streams: Streams,
    context: int,
    stride: int,
) -> Plan:
    """Plan to read each document by itself; `texts` are what the model reads of them."""
    sizes = np.zeros((len(texts), 4))
    sizes[:, BYTES] = [len(document.encode()) for document in corpus.documents]
    plan = Plan(protocol, figures, sizes, {"context": context, "stride": stride})
    for unit, text in enumerate(texts):
        stream = streams.of(text)
        length = len(streams.ids[stream])
        sizes[unit, TOKENS] = length - 1
        plan.asked += [(stream, window, unit) for window in rolling(length, context, stride)]
    return plan
