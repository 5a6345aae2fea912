"""Keyed permutations against plain integers, and their evenness."""

import itertools
import json
import math
from collections import Counter
from fractions import Fraction
from hashlib import shake_256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.data.permutation import Permutation, keyed_bits

WORD = (1 << 64) - 1


def reference(size, position, *key):
    """The same permutation in Python's integers, one position at a time."""
    digest = shake_256(json.dumps(list(key)).encode()).digest(96)
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(12)]
    rows = next(r for r in itertools.count(math.isqrt(size)) if r * r >= size)
    columns = math.ceil(Fraction(size, rows))
    while True:
        row, column = divmod(position, columns)
        for to_row, to_column in zip(keys[::2], keys[1::2], strict=True):
            row = (row + scramble(column ^ to_row) // 2) % rows
            column = (column + scramble(row ^ to_column) // 2) % columns
        position = row * columns + column
        if position < size:
            return position


def scramble(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(), st.text(max_size=5))
def test_every_element_stands_once(size, seed, name):
    order = Permutation(size, seed, name)(np.arange(size))
    assert sorted(order.tolist()) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 1 << 40), st.integers(0), st.data())
def test_equals_plain_integers(size, seed, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    permutation = Permutation(size, "k", seed)
    expected = [reference(size, p, "k", seed) for p in positions]
    assert permutation(np.array(positions)).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_all_orders_of_few_elements_are_equally_likely(size):
    orders = list(itertools.permutations(range(size)))
    draws = 25 * len(orders)
    seen = Counter(tuple(Permutation(size, k)(np.arange(size)).tolist()) for k in range(draws))
    chi_square = sum((seen[order] - 25) ** 2 / 25 for order in orders)
    freedom = len(orders) - 1
    assert abs(chi_square - freedom) <= 4.5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("size", [64, 100, 1000])
def test_neighbours_are_torn_apart(size):
    order = Permutation(size, "neighbours")(np.arange(size))
    assert np.abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / size**0.5
    assert (np.diff(order) == 1).sum() < 6  # about one is expected


def test_keys_are_told_apart():
    keys = [("a", "b"), ("ab",), ("a", "b", ""), (1,), ("1",), (1, 1), (11,), (-1,)]
    assert len({int(keyed_bits(*key)[0]) for key in keys}) == len(keys)


def test_the_order_is_the_same_for_ever():
    assert keyed_bits("mixture", 1).tolist() == [16058797160740673838]
    assert Permutation(9, "units", 1, "web", 0)(np.arange(9)).tolist() == [
        1,
        3,
        6,
        5,
        7,
        2,
        0,
        4,
        8,
    ]
