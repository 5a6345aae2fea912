"""Long texts -> parts that encode to the same ids one by one.

Flow: `tokenizer` cuts a long text here, for an encoder needs a hundred times the text's memory.
A cut is safe where no merge can cross it:
    - space pipeline: before a space that follows another character, as long as no token of the
      vocabulary holds a space after another character. The part that follows leaves this space
      out, since the pipeline puts one in front of every text;
    - byte pipeline: between two matches of the pattern, if the text before matches alike alone.
"""

import re
from collections.abc import Iterable, Iterator

from tokenizers import Regex, pre_tokenizers

from summerlm.tokenizer.pipeline import SPACE

SPACE_PART = 1 << 14  # least characters of a part: the encoder slows down on longer ones
MATCH_PART = 1 << 20  # the byte pipeline's pattern cuts by itself; this bounds memory only
REACH = 1 << 12  # what is looked at beyond it, at first
_SPACES = " " + SPACE
_BEFORE_SPACE = re.compile(f"(?<=[^{_SPACES}])[{_SPACES}](?=.)", re.DOTALL)
_SPACE_INSIDE = re.compile(b"[^ ] ")


def words_begin_tokens(tokens: Iterable[bytes]) -> bool:
    """Tell whether every space of a vocabulary begins a token, so that texts may be cut there.

    Args:
        tokens: Bytes of each token.

    Returns:
        True where no token holds a space after another character.
    """
    return not any(map(_SPACE_INSIDE.search, tokens))


def cut_at_spaces(text: str, part: int = SPACE_PART) -> Iterator[str]:
    """Cut a text for the space pipeline, whose vocabulary must allow it (`words_begin_tokens`).

    Args:
        text: Any text.
        part: Least characters of each part but the last.

    Yields:
        The parts; without the space in front of each but the first.
    """
    start = 0
    while found := _BEFORE_SPACE.search(text, start + part):
        yield text[start : found.start()]
        start = found.end()
    yield text[start:]


def cut_at_matches(text: str, pattern: str, part: int = MATCH_PART) -> Iterator[str]:
    """Cut a text for the byte pipeline.

    Args:
        text: Any text.
        pattern: The pipeline's regular expression.
        part: Least characters of each part but the last.

    Yields:
        The parts.
    """
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")

    def ends(piece: str) -> list[int]:
        return [stop for _, (_, stop) in splitter.pre_tokenize_str(piece)]

    start, reach = 0, REACH
    while len(text) - start > part + reach:
        found = ends(text[start : start + part + reach])
        at = next(i for i, stop in enumerate(found) if stop >= part)
        # a match that reaches the end of what was looked at may go on beyond it
        if found[at] < part + reach and ends(text[start : start + found[at]]) == found[: at + 1]:
            yield text[start : start + found[at]]
            start, reach = start + found[at], REACH
        else:
            reach *= 2
    yield text[start:]
