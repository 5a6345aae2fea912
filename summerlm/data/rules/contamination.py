"""Which texts share a run of words with an evaluation set.

Flow:
    1. `evaluation_texts` reads the items of an evaluation file, `item_pieces` cuts each;
    2. a `ContaminationIndex` keeps a hash of each run of `GRAM` words in them;
    3. `pipeline.Rules` asks `ContaminationIndex.hit` of every text, and drops those that hit;
       `recipes.contamination` asks for the items of which a text has something.

Limits: words are those of `normalised_words`. A piece of `SHORTEST` to `GRAM` - 1 words counts
whole, shorter ones can't be found. A translated or reworded item can't be found either. A text
that hits is dropped whole, however long; and a run that many texts share, as a licence or a
phrase of an exam, drops all of them if an evaluation set has it: look at what the report shows.

Source:
    Brown et al. 2020, arXiv:2005.14165, appendix C: runs of 8 to 13 words, in lower case and
    without punctuation. There a hit removes its surroundings, and runs that occur in more than
    10 training texts are spared, which can't be known while streaming.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from summerlm.core.errors import UsageError
from summerlm.data.rules.words import normalised_words

GRAM = 13  # words of a run
SHORTEST = 8  # words of the shortest piece that counts whole

_BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial that hashes a run; any odd number


class Overlap(NamedTuple):
    """What a text shares with an evaluation set."""

    words: str  # the run, normalised
    evaluation_set: str


class ContaminationIndex:
    """Finds runs of words that evaluation sets have too.

    Plain data of about 20 bytes per evaluation word; picklable. A text's word is looked up among
    the evaluation words, so that words unknown there cost nothing more. Runs are compared by
    hashes of 64 bits: between 10^12 words of text and 10^7 of evaluation half a false hit is
    expected.

    Args:
        items: Evaluation set and pieces of each item, as `evaluation_texts` gives them.
    """

    def __init__(self, items: Iterable[tuple[str, Sequence[str]]]) -> None:
        self.items: Counter[str] = Counter()
        """Items with a word in them, by evaluation set."""
        self.too_short: Counter[str] = Counter()
        """Those of them that can't be found, for no piece has `SHORTEST` words."""
        self._vocabulary: dict[str, int] = {}  # 0 stands for a word that is not in it
        self._sets: list[str] = []
        places: list[tuple[int, int]] = []  # of each item: its set, and its number there
        count: Counter[str] = Counter()
        ids = self._vocabulary
        pieces: dict[tuple[int, tuple[int, ...]], None] = {}  # item and words, each once
        for name, texts in items:
            if name not in self._sets:
                self._sets.append(name)
            places.append((self._sets.index(name), count[name]))
            count[name] += 1
            cut = [normalised_words(text) for text in texts]
            self.items[name] += any(cut)
            long = [words for words in cut if len(words) >= SHORTEST]
            self.too_short[name] += any(cut) and not long
            for words in long:
                key = tuple(ids.setdefault(word, len(ids) + 1) for word in words)
                pieces[len(places) - 1, key] = None
        self._places = np.array(places, np.int32).reshape(-1, 2)
        generator = np.random.default_rng(GRAM)
        self._values = generator.integers(2**64, size=len(ids) + 1, dtype=np.uint64)
        self._index(pieces)

    def _index(self, pieces: Iterable[tuple[int, tuple[int, ...]]]) -> None:
        """Hash the runs of all pieces, which are given as item and word numbers."""
        owners = np.fromiter((item for item, _ in pieces), np.int32)
        lengths = np.fromiter((len(piece) for _, piece in pieces), np.int64)
        words = np.fromiter((word for _, piece in pieces for word in piece), np.int64)
        values = self._values[words]
        piece = np.repeat(np.arange(len(lengths)), lengths)  # of each word
        ends = np.cumsum(lengths)
        left = ends[piece] - np.arange(len(words))  # words of the piece from this one on

        self._runs: dict[int, tuple[NDArray[np.uint64], NDArray[np.int32]]] = {}
        beginnings = []
        for n in range(GRAM, SHORTEST - 1, -1):
            whole = lengths[piece] == n if n < GRAM else np.True_
            starts = np.flatnonzero((left >= n) & whole)
            if starts.size:
                hashes, items = _hashes(values, n)[starts], owners[piece[starts]]
                order = np.lexsort((items, hashes))  # by hash, and then by item
                hashes, items = hashes[order], items[order]
                new = np.append(True, (hashes[1:] != hashes[:-1]) | (items[1:] != items[:-1]))
                self._runs[n] = hashes[new], items[new]
                beginnings.append(_hashes(values, SHORTEST)[starts])
        self._beginnings = np.unique(np.concatenate([*beginnings, np.empty(0, np.uint64)]))

    def hit(self, text: str) -> Overlap | None:
        """Look for a run that an evaluation set has too.

        Args:
            text: The text.

        Returns:
            The first run, the longer one where two begin at the same word; None if there is none.

        Example:
            >>> index = ContaminationIndex([("quiz", ["Who wrote the first novel about a whale?"])])
            >>> index.hit("He asked: who wrote 'The First Novel' about a WHALE, and why?")
            Overlap(words='who wrote the first novel about a whale', evaluation_set='quiz')
        """
        words, values, starts = self._look_up(text)
        first, longest = len(words), 0
        for n, (hashes, _) in self._runs.items() if starts.size else ():
            runs = _hashes(values, n)
            found = np.flatnonzero(_contains(hashes, runs[starts[starts < len(runs)]]))
            if found.size and starts[found[0]] < first:
                first, longest = int(starts[found[0]]), n
        if not longest:
            return None
        hashes, items = self._runs[longest]
        place = np.searchsorted(hashes, _hashes(values[first : first + longest], longest)[0])
        name = self._sets[self._places[items[place], 0]]
        return Overlap(" ".join(words[first : first + longest]), name)

    def items_in(self, text: str) -> dict[tuple[str, int], str]:
        """Find every item that shares a run with a text.

        Args:
            text: The text.

        Returns:
            Of each such item its evaluation set and its number there, from 0, with a run that it
            shares: the first of the longest kind.

        Example:
            >>> whale = "Who wrote the first novel about a whale?"
            >>> items = [("quiz", ["Why?"]), ("quiz", [whale]), ("more", [whale])]
            >>> index = ContaminationIndex(items)
            >>> list(index.items_in(f"He asked: {whale}"))
            [('quiz', 1), ('more', 0)]
        """
        words, values, starts = self._look_up(text)
        found: dict[tuple[str, int], str] = {}
        for n, (hashes, items) in self._runs.items() if starts.size else ():
            runs = _hashes(values, n)
            near = starts[starts < len(runs)]
            hits = near[_contains(hashes, runs[near])]
            _, once = np.unique(runs[hits], return_index=True)
            for start in hits[np.sort(once)]:
                low = np.searchsorted(hashes, runs[start], "left")
                high = np.searchsorted(hashes, runs[start], "right")
                shared = " ".join(words[start : start + n])
                for of_set, number in self._places[items[low:high]].tolist():
                    found.setdefault((self._sets[of_set], number), shared)
        return found

    def _look_up(self, text: str) -> tuple[list[str], NDArray[np.uint64], NDArray[np.int64]]:
        """Give a text's words, their values, and where a run of an item may begin."""
        words = normalised_words(text)
        ids = np.fromiter(map(self._vocabulary.get, words, repeat(0)), np.int64, len(words))
        values = self._values[ids]
        # every run begins with a run of SHORTEST words, and few texts have one of these
        starts = np.flatnonzero(_contains(self._beginnings, _hashes(values, SHORTEST)))
        return words, values, starts


def _hashes(values: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hash each run of n words: a polynomial in `_BASE` modulo 2^64 of the words' random values.

    Args:
        values: A value of each word, (words,).
        n: Words of a run.

    Returns:
        The hashes, (words - n + 1,), or none where the words are fewer.
    """
    count = max(len(values) - n + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes *= _BASE
        hashes += values[offset : offset + count]
    return hashes


def _contains(table: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell which keys stand in a sorted table."""
    if not table.size:
        return np.zeros(len(keys), bool)
    places = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return table[places] == keys


def evaluation_texts(path: Path) -> Iterator[list[str]]:
    """Read the texts of an evaluation file.

    Args:
        path: A parquet file, or JSON lines, also with gzip.

    Yields:
        The pieces of each row.

    Raises:
        UsageError: If the file can't be read as one of these.
    """
    try:
        yield from map(item_pieces, _rows(path))
    except (OSError, EOFError, zlib.error, ValueError, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{path}: can't be read as an evaluation set ({reason}); fetch it again"
        ) from error


def item_pieces(row: Any) -> list[str]:
    """Give what is looked for of an item.

    Args:
        row: Any nesting of mappings and lists.

    Returns:
        Every string in it, and before these all of them joined: an item may be copied with its
        choices or without.

    Example:
        >>> item_pieces({"question": "Why?", "choices": ["So.", "Not so."], "answer": 0})
        ['Why? So. Not so.', 'Why?', 'So.', 'Not so.']
    """
    leaves = list(_leaves(row))
    return [" ".join(leaves), *leaves]


def _rows(path: Path) -> Iterator[Any]:
    """Yield the values of a file's rows, by what the file begins with: caches name no kind."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        with pq.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches():
                yield from batch.to_pylist()
        return
    with gzip.open(path) if magic.startswith(b"\x1f\x8b") else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None


def _leaves(value: Any) -> Iterator[str]:
    """Yield the strings inside nested lists and mappings, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
