import operator
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from summerlm.core.errors import UsageError
from summerlm.data.config import SourceConfig
from summerlm.data.shards.rows import WRONG_TYPE, Dropped
from summerlm.data.shards.selection import parse_condition, selection

OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
numbers = st.integers(-5, 5) | st.floats(-5, 5, allow_nan=False)
words = st.text("abz-. ", min_size=1).map(str.strip).filter(bool)


@given(numbers, st.sampled_from(sorted(OPERATORS)), numbers)
def test_numbers_compare_as_numbers(value: float, sign: str, written: float) -> None:
    condition = parse_condition("s", f"n {sign} {written!r}")
    assert condition.holds({"n": value}) == OPERATORS[sign](value, written)
    assert condition.holds({"n": Decimal(value)}) == OPERATORS[sign](value, written)
    assert not condition.holds({"n": None})
    assert not condition.holds({"m": value})
    assert not condition.holds({"n": float("nan")})


@given(words, st.sampled_from(sorted(OPERATORS)), words)
def test_texts_compare_as_texts(value: str, sign: str, written: str) -> None:
    condition = parse_condition("s", f"name{sign}{written}")
    assert condition.holds({"name": value}) == OPERATORS[sign](value, written)
    assert condition.holds({"name": value.encode()}) == OPERATORS[sign](value, written)
    assert not condition.holds({"name": 1})


@given(st.lists(words | numbers.map(repr), min_size=1, max_size=4), words)
def test_membership(choices: list[str], value: str) -> None:
    condition = parse_condition("s", f"meta.licence in {', '.join(choices)}")
    for text in (value, *choices):
        assert condition.holds({"meta": {"licence": text}}) == (text in choices)
    for row in ({}, {"meta": None}, {"meta": value}, {"meta": {"other": value}}):
        assert not condition.holds(row)


@pytest.mark.parametrize(
    ("text", "row", "expected"),
    [
        ('lang = "en"', {"lang": "en"}, True),
        ("lang = 'en'", {"lang": "en"}, True),
        ('licence in "CC BY, any", MIT', {"licence": "CC BY, any"}, True),
        ('licence in "CC BY, any", MIT', {"licence": "MIT"}, True),
        ('licence in "CC BY, any", MIT', {"licence": "any"}, False),
        ("year = 2020", {"year": 2020}, True),
        ("year = 2020", {"year": "2020"}, True),
        ('year = "2020"', {"year": 2020}, False),
        ("year in 2020, 2021", {"year": 2021.0}, True),
        ("id = 9007199254740993", {"id": 9007199254740993}, True),
        ("id = 9007199254740993", {"id": 9007199254740992}, False),
        ("score > 0.5", {"score": "0.9"}, False),  # a text, whatever it looks like
        ("date >= 2020-01-01", {"date": "2020-02-01"}, True),
        ("is_code = true", {"is_code": True}, True),
        ("is_code = true", {"is_code": False}, False),
        ("is_code = 1", {"is_code": True}, False),
        ("a.b.c <= -1e3", {"a": {"b": {"c": -1000}}}, True),
    ],
)
def test_what_conditions_mean(text: str, row: dict[str, object], expected: bool) -> None:
    assert parse_condition("s", text).holds(row) is expected


@pytest.mark.parametrize(
    "text", ["", "score", "score >=", ">= 1", "score == 1", "score != 1", "score => 1", "in a, b"]
)
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        selection("web", SourceConfig(weight=1, path="x", where=("a = 1", text)))
    assert str(caught.value).startswith(f"source web: where = {text!r}: write `column >= 0.8`")


def test_a_row_tells_which_condition_it_missed() -> None:
    config = SourceConfig(weight=1, path="x", column="t", where=("a > 1", "b in x, y"))
    chosen = selection("web", config)
    assert chosen.row({"t": "text", "a": 2, "b": "y"}) == "text"
    assert chosen.row({"t": "text", "a": 2, "b": "z"}) == Dropped("where b in x, y")
    assert chosen.row({"t": "text", "a": 1, "b": "z"}) == Dropped("where a > 1")
    assert chosen.row({"t": 5, "a": 2, "b": "y"}) is WRONG_TYPE
