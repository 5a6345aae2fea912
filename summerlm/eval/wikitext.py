"""WikiText's rows as the articles they were, and its text as people write it.

Flow: `texts` makes a set's rows into documents with these; `protocols` measures them.

WikiText is one file of tokens with spaces between them. The hub's `Salesforce/wikitext` has a row
a line, in which an empty row stands for the line of one space; `EleutherAI/wikitext_document_level`
has a row an article. `read_articles` makes the second of the first, character by character.
"""

import re
from collections.abc import Iterable, Sequence

UNKNOWN = "<unk>"  # what the sets named v1 have in place of rare words; the raw ones don't


def read_articles(rows: Iterable[str]) -> list[list[str]]:
    r"""Group rows into articles: each begins at a heading of the first level, ` = Title = `.

    Args:
        rows: The set's rows in order, each with its line end, or empty.

    Returns:
        The rows of each article; empty rows before the first heading belong to none.

    Example:
        >>> read_articles(["", " = Sun = \n", "", " Hot . \n", " = = Age = = \n", " = Moon = \n"])
        [[' = Sun = \n', '', ' Hot . \n', ' = = Age = = \n'], [' = Moon = \n']]
    """
    articles: list[list[str]] = [[]]
    for row in rows:
        if _is_title(row):
            articles.append([])
        articles[-1].append(row)
    return [article for article in articles if "".join(article).strip()]


def page_of(article: Sequence[str], *, last: bool) -> str:
    r"""Write an article's rows as one page, as `EleutherAI/wikitext_document_level` has it.

    Args:
        article: Its rows.
        last: Whether it ends the file, whose last line end then belongs to it.

    Returns:
        The page: lines joined by line ends, of which the last line has none.

    Example:
        >>> page_of([" = Sun = \n", "", " Hot . \n"], last=False)
        ' = Sun = \n \n Hot . '
    """
    lines = [row.removesuffix("\n") if row else " " for row in article]
    return "\n".join([*lines, ""] if last else lines)


def rows_of(page: str) -> list[str]:
    r"""Give back the rows that a page was made of.

    Args:
        page: An article as `page_of` writes it.

    Returns:
        Its rows, with their line ends; empty ones for lines without a word.

    Example:
        >>> rows_of(" = Sun = \n \n Hot . ")
        [' = Sun = \n', '', ' Hot . \n']
    """
    lines = page.removesuffix("\n").split("\n")
    return [f"{line}\n" if line.strip() else "" for line in lines]


def count_words(page: str) -> int:
    """Count words as lm-eval does for word perplexity: pieces between white space.

    White space at an end of the page leaves an empty piece there, and that counts: a page of
    WikiText begins and ends with a space, so it has two words more than one would say.

    Args:
        page: The page before `detokenize`.

    Returns:
        How many pieces there are.

    Source:
        lm-eval, lm_eval/tasks/wikitext/preprocess_wikitext.py, process_results.
    """
    return len(re.split(r"\s+", page))


# lm-eval's rules in their order, also the odd one on a digit between slashes
_APOSTROPHES = [(re.compile(r"s '"), "s'"), (re.compile(r"/' [0-9]/"), "/'[0-9]/")]
_SEPARATORS = [(" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]
_MARKS = [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
_PAIRS = [
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
]
_AFTER = [
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def detokenize(page: str) -> str:
    """Undo WikiText's spaces round marks, as lm-eval does before the model reads a page.

    Args:
        page: A page with a space between tokens.

    Returns:
        The page as people write it, about.

    Source:
        lm-eval, lm_eval/tasks/wikitext/preprocess_wikitext.py, wikitext_detokenizer; the rules
        are those of Megatron-LM's evaluation (Shoeybi et al. 2019, arXiv:1909.08053).

    Example:
        >>> detokenize('the " red @-@ hot " sun , ( a star ) , 4 @.@ 6 billion years old .')
        'the "red-hot" sun, (a star), 4.6 billion years old .'
    """
    for pattern, new in _APOSTROPHES:
        page = pattern.sub(new, page)
    for old, new in (*_SEPARATORS, *_MARKS):
        page = page.replace(old, new)
    for pattern, new in _PAIRS:
        page = pattern.sub(new, page)
    for old, new in _AFTER:
        page = page.replace(old, new)
    return page


def _is_title(row: str) -> bool:
    """Tell whether a line is a heading of the first level: one mark at each end."""
    line = row.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")
