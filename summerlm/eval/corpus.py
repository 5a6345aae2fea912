"""A text set as the protocols need it: its documents, and the rows that it lists.

Flow: made of a set's rows by their layout, or of whole documents; `protocols` measures it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from summerlm.core.errors import UsageError
from summerlm.eval.wikitext import UNKNOWN, detokenize, page_of, read_articles, rows_of

BETWEEN = "\n\n"  # what joins rows to one text, as in Hugging Face's guide

LAYOUTS = ("documents", "wikitext", "wikitext_pages")


@dataclass(frozen=True)
class Corpus:
    """A text set.

    Attributes:
        documents: Each document as it is.
        rows: The rows that each document had in the set; most often itself alone.
        detokenize: Makes what a model reads of a document under lm-eval's protocol; None = itself.
    """

    documents: list[str]
    rows: list[list[str]]
    detokenize: Callable[[str], str] | None = None

    @classmethod
    def of_documents(cls, documents: Iterable[str]) -> "Corpus":
        """Take texts as they are.

        Args:
            documents: Texts.

        Returns:
            A set with a row a document.
        """
        texts = list(documents)
        return cls(texts, [[text] for text in texts])

    @classmethod
    def of_rows(cls, layout: str, rows: Iterable[Any]) -> "Corpus":
        """Take a set's rows.

        Args:
            layout: "documents" for a document a row, "wikitext" for rows that are the lines of
                WikiText, "wikitext_pages" for an article of WikiText a row.
            rows: The text of each row, in order.

        Returns:
            The set.

        Raises:
            UsageError: If a row holds no text, or the layout is unknown.
        """
        texts = list(rows)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UsageError(f"row {number} holds no text but {type(text).__name__}")
        if layout == "documents":
            return cls.of_documents(texts)
        if layout == "wikitext":
            articles = read_articles(texts)
            pages = [page_of(a, last=a is articles[-1]) for a in articles]
        elif layout == "wikitext_pages":
            articles, pages = [rows_of(page) for page in texts], texts
        else:
            raise UsageError(f"layout {layout!r}: should be one of {', '.join(LAYOUTS)}")
        return cls(pages, articles, detokenize)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its figures must know."""
        unknown = sum(document.count(UNKNOWN) for document in self.documents)
        if self.detokenize is None or not unknown:
            return ()
        return (
            f"{unknown:,} words of this set are {UNKNOWN} (its v1 form), which the tokenizer reads "
            "as letters: compare with nothing measured on the raw form",
        )

    @cached_property
    def lines(self) -> list[str]:
        """Every line of the rows without white space at its ends, empty ones left out."""
        parts = (line.strip() for rows in self.rows for row in rows for line in row.split("\n"))
        return [line for line in parts if line]

    @cached_property
    def joined(self) -> str:
        """All rows as one text."""
        return BETWEEN.join(row for rows in self.rows for row in rows)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Where in the bytes of `joined` the document after each one begins, (documents,)."""
        sizes = [sum(len(row.encode()) + len(BETWEEN) for row in rows) for rows in self.rows]
        return np.cumsum(np.array(sizes, dtype=np.int64))
