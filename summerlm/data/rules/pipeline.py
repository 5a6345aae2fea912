"""A text -> the text as it is trained on, or the rule that drops it.

Flow: each of `sources`' sources has one `Rules`, called with every text that is read; the ledger
counts what was dropped by rule, and what was changed. A pure function of the text, so that a
resumed run drops and changes the same.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from summerlm.data.rules import catalogue, quality
from summerlm.data.rules.contamination import ContaminationIndex
from summerlm.data.rules.scrubbing import SCRUBBERS
from summerlm.data.shards.rows import Dropped, Row

TOO_SHORT = "shorter than min_characters"
TOO_LONG = "longer than max_characters"


class Cleaned(NamedTuple):
    """What the rules made of a text."""

    text: Row
    changes: dict[str, int]  # how often each changing rule acted; none on a dropped text


class Rules:
    """The rules of one source that look at a text by itself; plain data, picklable.

    Args:
        names: Rules and groups of `catalogue`; those that compare documents are not for here.
        contamination: The evaluation sets' runs of words; needed by the rule `contamination`.
        min_characters: Shortest text that is kept; None = any.
        max_characters: Longest text that is kept; None = any.

    Raises:
        UsageError: If a name is unknown.

    Example:
        >>> rules = Rules(["emails"], min_characters=10)
        >>> rules("Mail ann@mail.org.")
        Cleaned(text='Mail email@example.com.', changes={'emails': 1})
        >>> rules("Too short")
        Cleaned(text=Dropped(reason='shorter than min_characters'), changes={})
    """

    def __init__(
        self,
        names: Sequence[str],
        contamination: ContaminationIndex | None = None,
        min_characters: int | None = None,
        max_characters: int | None = None,
    ) -> None:
        asked = catalogue.expand(names)
        self._quality = tuple(name for name in asked if name in quality.RULES)
        self._scrubbers = tuple(name for name in asked if name in SCRUBBERS)
        self._contamination = contamination if "contamination" in asked else None
        assert self._contamination is not None or "contamination" not in asked
        self._min = 0 if min_characters is None else min_characters
        self._max = max_characters

    def __call__(self, text: str) -> Cleaned:
        """Apply the rules to a text.

        Args:
            text: The text.

        Returns:
            The text, changed or not, or the first rule that drops it.
        """
        reason = next(self.failing(text), None)
        if reason is not None:
            return Cleaned(Dropped(reason), {})
        return Cleaned(*self.scrub(text))

    def scrub(self, text: str) -> tuple[str, dict[str, int]]:
        """Apply the rules that change a text, and no other.

        Args:
            text: The text.

        Returns:
            The text, changed or not, and how often each rule acted.
        """
        changes = {}
        for name in self._scrubbers:
            text, count = SCRUBBERS[name](text)
            if count:
                changes[name] = count
        return text, changes

    def failing(self, text: str) -> Iterator[str]:
        """Find all rules that would drop a text, for a report.

        Args:
            text: The text.

        Yields:
            The reason of each, in the order in which they are asked.
        """
        if len(text) < self._min:
            yield TOO_SHORT
        if self._max is not None and len(text) > self._max:
            yield TOO_LONG
        yield from quality.failing(text, self._quality)
        if self._contamination is not None and self._contamination.hit(text) is not None:
            yield "contamination"
