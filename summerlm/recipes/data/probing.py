"""Rows drawn from all over a source, and what they say about the whole of it.

Flow: `checking`, `forecast` and `judging` draw with `draw`; `probe` measures what was drawn and
estimates the source's tokens from it. Units are drawn in keyed order and rows within a unit too,
so that a sample is spread over all files, never their head, and is the same at every call.

The estimate rests on what is known of all units, the bytes that their text takes in the files:

    ids of texts = bytes of all units * (text / bytes) of the units read * (ids / text) of the rows

and BOS and EOS of each document, in as many rows as give one.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from summerlm.core.progress import Progress, silent
from summerlm.data.encoding import Encoder
from summerlm.data.permutation import Permutation, keyed_bits
from summerlm.data.shards.rows import Dropped, Row
from summerlm.data.sources import Source
from summerlm.data.units import Unit
from summerlm.tokenizer.tokenizer import Tokenizer

WINDOW = 20_000  # characters of a text that are encoded
UNITS = 32  # units that a sample is spread over, at least, where a source has them
LINE = 80  # characters of an example
BORDERS = 2  # BOS and EOS


@dataclass(frozen=True)
class Drawn:
    """Some rows of one unit.

    Attributes:
        unit: Index of the unit.
        rows: The rows drawn.
        numbers: Of each its index into what `Source.read` gives of the unit.
        text_bytes: UTF-8 bytes of the text of all rows of the unit.
    """

    unit: int
    rows: list[Row]
    numbers: list[int]
    text_bytes: int


def draw(source: Source, count: int, progress: Progress = silent) -> Iterator[Drawn]:
    """Draw training rows spread over a source.

    Args:
        source: The source.
        count: How many rows; all of a source that has fewer.
        progress: Called after each unit.

    Yields:
        What was drawn, a unit at a time, in keyed order.

    Raises:
        DataChangedError: If a file is another than the opened one.
        SourceDownError: If a file can't be read.
    """
    sizes = np.array(source.units)
    left = count = min(count, int(sizes.sum()))
    most = -(-count // UNITS)  # rows a unit
    while np.minimum(sizes, most).sum() < count:
        most *= 2
    for unit in Permutation(len(sizes), "drawn units", source.name)(np.arange(len(sizes))).tolist():
        rows = source.read(unit)
        order = Permutation(len(rows), "drawn rows", source.name, unit)
        chosen = order(np.arange(min(most, left, len(rows)))).tolist()
        left -= len(chosen)
        yield Drawn(unit, [rows[row] for row in chosen], chosen, sum(map(_text_bytes, rows)))
        progress(f"drawing from {source.name}", count - left, count)
        if not left:
            return


@dataclass
class Probe:
    """What the rows drawn from a source came to.

    Attributes:
        rows: Rows drawn.
        no_text: Rows among them without a text, by reason.
        dropped: Rows with a text that the source's settings leave out, by rule.
        changed: Texts that a rule changed, by rule.
        tokens: Ids of each kept text, with BOS and EOS; of a long one as a window of it has them.
        bytes: UTF-8 bytes of each kept text.
        example: Beginning of the first kept text, in one line.
        source_tokens: Estimated ids of an epoch.
        source_documents: Estimated documents of an epoch.
    """

    rows: int = 0
    no_text: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    tokens: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    example: str = ""
    source_tokens: float = 0.0
    source_documents: float = 0.0


def probe(
    source: Source,
    tokenizer: Tokenizer,
    count: int,
    progress: Progress = silent,
) -> Probe:
    """Draw rows of a source, clean and encode them, and estimate the source's tokens.

    Args:
        source: The source.
        tokenizer: Encodes the texts.
        count: How many rows to draw.
        progress: Called now and then.

    Returns:
        What the rows came to.

    Raises:
        UsageError: If the source has dialogues for which the tokenizer has no template.
        DataChangedError: If a file is another than the opened one.
        SourceDownError: If a file can't be read.
    """
    encoder = Encoder(tokenizer, source.chat)
    all_bytes = unit_bytes(source)
    found = Probe()
    known_bytes, text_bytes = 0.0, 0  # of the units read: in their files, and as text
    raw_bytes = 0  # of the rows drawn, before rules
    for drawn in draw(source, count, progress):
        known_bytes += float(all_bytes[drawn.unit])
        text_bytes += drawn.text_bytes
        for row in drawn.rows:
            found.rows += 1
            if isinstance(row, Dropped):
                found.no_text[row.reason] += 1
                continue
            raw_bytes += _text_bytes(row)
            text, changes = source.clean(row)
            found.changed.update(changes.keys())
            if isinstance(text, Dropped):
                found.dropped[text.reason] += 1
                continue
            found.example = found.example or one_line(text)
            key = (source.name, drawn.unit, found.rows)
            found.tokens.append(
                _count_tokens(encoder, text, len(text) if source.chat else WINDOW, key)
            )
            found.bytes.append(_text_bytes(text))
    if raw_bytes and known_bytes:
        whole = float(all_bytes.sum()) * text_bytes / known_bytes
        found.source_documents = sum(source.units) * len(found.tokens) / found.rows
        inside = sum(found.tokens) - BORDERS * len(found.tokens)
        found.source_tokens = whole * inside / raw_bytes + BORDERS * found.source_documents
    return found


def unit_bytes(source: Source) -> NDArray[np.float64]:
    """Tell how many bytes the text of each unit takes in its file, by rows of its group.

    Args:
        source: The source.

    Returns:
        Bytes of each unit, (units,), float64.
    """
    shards, groups, rows = source.table[:, [Unit.SHARD, Unit.GROUP, Unit.ROWS]].T
    bytes_a_row = [
        np.array(shard.group_bytes) / np.maximum(shard.groups, 1) for shard in source.shards
    ]
    first = np.cumsum([0, *map(len, bytes_a_row)])
    return np.concatenate(bytes_a_row)[first[shards] + groups] * rows


def one_line(text: str, characters: int = LINE) -> str:
    r"""Show the beginning of a text in one line.

    Args:
        text: Any text.
        characters: How much of it.

    Returns:
        The beginning, with what a terminal wouldn't show as itself written as in Python.

    Example:
        >>> one_line("\tif x:\n  y \x1b[31m", 20)
        '\\tif x:\\n  y \\x1b[31m'
    """
    return "".join(
        character if character.isprintable() else repr(character)[1:-1]
        for character in text[:characters]
    )


def _count_tokens(encoder: Encoder, text: str, window: int, key: tuple[str, int, int]) -> float:
    """Count a text's ids, BOS and EOS included; of a longer one by a window at a keyed place."""
    hidden = len(text) - window
    if hidden <= 0:
        return float(encoder(text).ids.size)
    start = int(keyed_bits("window", *key)[0]) % (hidden + 1)
    inside = encoder(text[start : start + window]).ids.size - BORDERS
    return BORDERS + inside * len(text) / window


def _text_bytes(row: Row) -> int:
    return 0 if isinstance(row, Dropped) else len(row.encode())
