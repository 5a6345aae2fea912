"""Gopher's rules of quality and repetition, each by its name.

Flow: `pipeline.Rules` asks `failing` of every text, whose first name is why a text is dropped;
a report takes all names. `RULES` holds the rules in their order, each with the sentence that
`catalogue` shows. They are made for English prose: code, lists and other scripts fail many.

Read as follows where the paper leaves a choice:
    - a word is what white space divides, punctuation included, in its own case; characters are
      those of words, white space is not counted;
    - lines and paragraphs are stripped and never blank; blank lines divide paragraphs;
    - of a repeated line, paragraph or n-gram the first occurrence is no duplicate;
    - the top n-gram occurs at least twice; of equally frequent ones it is the longest, and
      occurrences that overlap count in full;
    - a stop word may stand in any case and between any punctuation.

Source:
    Rae et al. 2021, arXiv:2112.11446, appendix A.1.1 and table A1.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WORDS = (50, 100_000)
WORD_CHARACTERS = (3, 10)  # of the mean word
SYMBOLS = 10  # symbols per 100 words
BULLET_LINES = 90  # per cent of lines
ELLIPSIS_LINES = 30
LETTER_WORDS = 80  # per cent of words
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
STOP_WORDS_NEEDED = 2

DUPLICATE_PIECES = 30  # per cent of lines or paragraphs, and...
DUPLICATE_PIECE_CHARACTERS = 20  # ...of the characters in them
TOP_GRAM = {2: 20, 3: 18, 4: 16}  # n -> per cent of characters
DUPLICATE_GRAMS = {5: 15, 6: 14, 7: 13, 8: 12, 9: 11, 10: 10}

BULLETS = ("•", "‣", "◦", "⁃", "▪", "■", "●", "○", "·", "*", "-", "–")  # noqa: RUF001
ELLIPSES = ("...", "…")

_STOP_WORD = re.compile(rf"\b(?:{'|'.join(STOP_WORDS)})\b", re.IGNORECASE)


class Measures:
    """What the rules ask of one text; each part is made when first asked for, once.

    Args:
        text: The text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._repeats: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @cached_property
    def words(self) -> list[str]:
        """The words in order."""
        return self.text.split()

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each word, (words,)."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def lines(self) -> list[str]:
        """The lines, stripped, without the blank ones."""
        return [line for line in self._stripped_lines if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """The paragraphs, their lines stripped."""
        return ["\n".join(lines) for full, lines in groupby(self._stripped_lines, bool) if full]

    @cached_property
    def _stripped_lines(self) -> list[str]:
        return [line.strip() for line in self.text.splitlines()]

    def words_with_letter(self) -> int:
        """Count the words that hold an alphabetic character."""
        return sum(word.isalpha() or any(map(str.isalpha, word)) for word in self.words)

    def has_stop_words(self) -> bool:
        """Tell whether enough different stop words occur."""
        found = set()
        for match in _STOP_WORD.finditer(self.text):
            found.add(match[0].lower())
            if len(found) == STOP_WORDS_NEEDED:
                return True
        return False

    def top_gram_characters(self, n: int) -> int:
        """Count the characters in all occurrences of the most frequent n-gram."""
        starts, grams = self._repeated(n)
        if not starts.size:
            return 0
        counts = np.bincount(grams)
        top = counts[grams] == counts.max()
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        characters = ends[starts[top] + n] - ends[starts[top]]
        return int(counts.max() * characters.max())

    def duplicate_gram_characters(self, n: int) -> int:
        """Count the characters inside n-grams that occurred before, each character once."""
        starts, grams = self._repeated(n)
        again = np.ones(len(starts), bool)
        again[np.unique(grams, return_index=True)[1]] = False  # the first occurrence of each
        inside = np.zeros(len(self.words), bool)
        for word in range(n):
            inside[starts[again] + word] = True
        return int(self.lengths[inside].sum())

    def _repeated(self, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the n-grams that occur more than once.

        A repeated n-gram begins with a repeated (n - 1)-gram, so few places are left to look at.

        Args:
            n: Words of a gram, at least 1.

        Returns:
            Index of each occurrence's first word, ascending, and which n-gram it is, a number
            that all its occurrences share; both (occurrences,).
        """
        if n not in self._repeats:
            words = self._word_ids
            starts, keys = np.arange(len(words)), words
            if n > 1:
                starts, shorter = self._repeated(n - 1)
                fits = starts + n <= len(words)
                starts = starts[fits]
                keys = shorter[fits] * len(words) + words[starts + n - 1]
            _, grams, counts = np.unique(keys, return_inverse=True, return_counts=True)
            again = counts[grams] > 1
            self._repeats[n] = starts[again], grams[again]
        return self._repeats[n]

    @cached_property
    def _word_ids(self) -> NDArray[np.int64]:
        """A number of each word, below the count of words, the same for the same word."""
        ids: dict[str, int] = {}
        return np.fromiter(
            (ids.setdefault(word, len(ids)) for word in self.words), np.int64, len(self.words)
        )


class Rule(NamedTuple):
    """One reason to drop a text."""

    sentence: str  # what it drops, for people
    hits: Callable[[Measures], bool]


def _exceeds(part: int, whole: int, percent: int) -> bool:
    """Compare a share with a threshold, in integers; a share of nothing exceeds none."""
    return 100 * part > percent * whole


def _duplicates(pieces: Sequence[str], *, characters: bool, percent: int) -> bool:
    """Tell whether too many pieces, or characters in them, occurred before."""
    first = dict.fromkeys(pieces)
    if characters:
        whole = sum(map(len, pieces))
        return _exceeds(whole - sum(map(len, first)), whole, percent)
    return _exceeds(len(pieces) - len(first), len(pieces), percent)


def _symbols(m: Measures) -> bool:
    counts = m.text.count("#"), sum(map(m.text.count, ELLIPSES))
    return any(_exceeds(count, len(m.words), SYMBOLS) for count in counts)


def _word_length(m: Measures) -> bool:
    shortest, longest = (mean * len(m.words) for mean in WORD_CHARACTERS)
    return not shortest <= int(m.lengths.sum()) <= longest


def _lines(m: Measures, marked: Callable[[str], bool], percent: int) -> bool:
    return _exceeds(sum(map(marked, m.lines)), len(m.lines), percent)


def _pieces(name: str, take: Callable[[Measures], list[str]]) -> dict[str, Rule]:
    """Make the two rules of repeated lines or paragraphs."""
    few, letters = DUPLICATE_PIECES, DUPLICATE_PIECE_CHARACTERS
    return {
        f"gopher-duplicate-{name}s": Rule(
            f"More than {few} % of the {name}s occurred before in the text.",
            lambda m: _duplicates(take(m), characters=False, percent=few),
        ),
        f"gopher-duplicate-{name}-characters": Rule(
            f"More than {letters} % of the characters stand in {name}s that occurred before.",
            lambda m: _duplicates(take(m), characters=True, percent=letters),
        ),
    }


def _top_gram(n: int, percent: int) -> Rule:
    return Rule(
        f"More than {percent} % of the characters stand in the most frequent {n}-gram of words.",
        lambda m: _exceeds(m.top_gram_characters(n), int(m.lengths.sum()), percent),
    )


def _duplicate_grams(n: int, percent: int) -> Rule:
    return Rule(
        f"More than {percent} % of the characters stand in {n}-grams that occurred before.",
        lambda m: _exceeds(m.duplicate_gram_characters(n), int(m.lengths.sum()), percent),
    )


QUALITY: dict[str, Rule] = {
    "gopher-words": Rule(
        f"Fewer than {WORDS[0]} or more than {WORDS[1]:,} words.",
        lambda m: not WORDS[0] <= len(m.words) <= WORDS[1],
    ),
    "gopher-word-length": Rule(
        f"A mean word shorter than {WORD_CHARACTERS[0]} or longer than {WORD_CHARACTERS[1]} "
        "characters.",
        _word_length,
    ),
    "gopher-symbols": Rule(
        f"More than {SYMBOLS} hash signs, or {SYMBOLS} ellipses, per 100 words.", _symbols
    ),
    "gopher-bullets": Rule(
        f"More than {BULLET_LINES} % of the lines begin with a bullet.",
        lambda m: _lines(m, lambda line: line.startswith(BULLETS), BULLET_LINES),
    ),
    "gopher-ellipses": Rule(
        f"More than {ELLIPSIS_LINES} % of the lines end with an ellipsis.",
        lambda m: _lines(m, lambda line: line.endswith(ELLIPSES), ELLIPSIS_LINES),
    ),
    "gopher-letters": Rule(
        f"Fewer than {LETTER_WORDS} % of the words hold a letter.",
        lambda m: 100 * m.words_with_letter() < LETTER_WORDS * len(m.words),
    ),
    "gopher-stop-words": Rule(
        f"Fewer than {STOP_WORDS_NEEDED} different words of: {', '.join(STOP_WORDS)}.",
        lambda m: not m.has_stop_words(),
    ),
}

_LINES = _pieces("line", lambda m: m.lines)
_PARAGRAPHS = _pieces("paragraph", lambda m: m.paragraphs)

REPETITION: dict[str, Rule] = {
    **_LINES,
    **_PARAGRAPHS,
    **{f"gopher-top-{n}-grams": _top_gram(n, percent) for n, percent in TOP_GRAM.items()},
    **{
        f"gopher-duplicate-{n}-grams": _duplicate_grams(n, percent)
        for n, percent in DUPLICATE_GRAMS.items()
    },
}

RULES = {**QUALITY, **REPETITION}


def failing(text: str, names: Iterable[str]) -> Iterator[str]:
    """Find the rules that would drop a text.

    Args:
        text: The text.
        names: The rules to ask, in the order to ask them.

    Yields:
        The name of each that would; a rule is computed when its turn comes.

    Example:
        >>> list(failing("ha ha ha ha", ["gopher-words", "gopher-letters", "gopher-top-2-grams"]))
        ['gopher-words', 'gopher-top-2-grams']
    """
    measures = Measures(text)
    yield from (name for name in names if RULES[name].hits(measures))
