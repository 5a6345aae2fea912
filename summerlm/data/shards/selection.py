"""What of a row is its text, and which rows count: the settings `column`, `conversations`, `where`.

Flow: `formats` reads a `Selection` from the settings; `parquet` and `jsonlines` ask it for each
row's text, or why there is none.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from summerlm.core.errors import UsageError
from summerlm.data.config import SourceConfig
from summerlm.data.shards.rows import Dropped, Row, dialogue, plain_text, turns

_FORMS = {"text": plain_text, "original": dialogue, "chat": turns}

_COMPARISON = re.compile(r"\s*([^\s<>=!]+)\s*(>=|<=|>|<|=)\s*([^\s<>=].*)", re.DOTALL)
_MEMBERSHIP = re.compile(r"\s*(\S+)\s+in\s+(\S.*)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Literal(NamedTuple):
    """A value as a condition writes it."""

    text: str
    number: float | None  # None where it is no number, or written in quotes


class Condition(NamedTuple):
    """A condition that a row must meet.

    Args:
        text: As the settings write it.
        path: Column, and the keys below it.
        operator: `>=`, `<=`, `>`, `<`, `=` or `in`.
        values: What it compares with; several for `in`.
    """

    text: str
    path: tuple[str, ...]
    operator: str
    values: tuple[Literal, ...]

    @property
    def column(self) -> str:
        """The column or key of the row."""
        return self.path[0]

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Judge a row; a missing value meets no condition.

        Args:
            row: Its values by column or key; bytes are taken as UTF-8.

        Returns:
            Whether it meets the condition.
        """
        value: Any = row
        for key in self.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, bytes):
            value = value.decode("utf-8", errors="replace")
        if isinstance(value, bool):
            value = str(value).lower()
        return any(self._compare(value, literal) for literal in self.values)

    def _compare(self, value: object, literal: Literal) -> bool:
        if isinstance(value, int | float | Decimal):
            return literal.number is not None and _ordered(value, self.operator, literal.number)
        if not isinstance(value, str):
            return False
        if self.operator in ("=", "in"):
            return value == literal.text
        return literal.number is None and _ordered(value, self.operator, literal.text)


def _ordered(value: Any, operator: str, other: Any) -> bool:
    if operator == ">=":
        return bool(value >= other)
    if operator == "<=":
        return bool(value <= other)
    if operator == ">":
        return bool(value > other)
    if operator == "<":
        return bool(value < other)
    return bool(value == other)


def parse_condition(source: str, text: str) -> Condition:
    """Read a condition.

    Args:
        source: The source's name, for messages.
        text: The condition, as `column >= 0.8` or `column in A, B`.

    Returns:
        The condition.

    Raises:
        UsageError: If it is none.

    Example:
        >>> score = parse_condition("web", "language_score >= 0.8")
        >>> score.holds({"language_score": 0.9}), score.holds({})
        (True, False)
    """
    if match := _COMPARISON.fullmatch(text):
        column, operator, written = match.groups()
        values = [written]
    elif match := _MEMBERSHIP.fullmatch(text):
        column, written = match.groups()
        operator, values = "in", re.findall(r'\s*("[^"]*"|[^,]+)', written)
    else:
        raise UsageError(
            f"source {source}: where = {text!r}: write `column >= 0.8` (or <=, >, <, =) or "
            "`column in A, B`"
        )
    return Condition(text, tuple(column.split(".")), operator, tuple(map(_literal, values)))


def _literal(written: str) -> Literal:
    written = written.strip()
    if len(written) > 1 and written[0] == written[-1] and written[0] in "\"'":
        return Literal(written[1:-1], None)
    return Literal(written, _number(written) if _NUMBER.fullmatch(written) else None)


def _number(written: str) -> float:
    return int(written) if re.fullmatch(r"[+-]?\d+", written) else float(written)


@dataclass(frozen=True)
class Selection:
    """What of a row is its text, and which rows count.

    Args:
        column: Column of a parquet file, or key of a JSON object, that holds the text.
        form: `text`, or how a dialogue is written: `original` or `chat`.
        where: Conditions that a row must meet.
    """

    column: str
    form: str = "text"
    where: tuple[Condition, ...] = ()

    @property
    def dialogue(self) -> bool:
        """Whether the column holds turns rather than a text."""
        return self.form != "text"

    def row(self, values: Mapping[str, Any]) -> Row:
        """Read a row.

        Args:
            values: Its values by column or key.

        Returns:
            Its text, or why it has none.
        """
        for condition in self.where:
            if not condition.holds(values):
                return Dropped(f"where {condition.text}")
        return _FORMS[self.form](values.get(self.column))


def selection(source: str, config: SourceConfig) -> Selection:
    """Read the settings of a source.

    Args:
        source: Its name, for messages.
        config: Its settings.

    Returns:
        What of a row is its text, and which rows count.

    Raises:
        UsageError: If a condition is none.
    """
    where = tuple(parse_condition(source, text) for text in config.where)
    if config.conversations is not None:
        return Selection(config.conversations, config.template, where)
    return Selection(config.column or "text", "text", where)
