"""The mixture against its formula, and how even it is in every lane and at every moment."""

from fractions import Fraction
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.core.errors import UsageError
from summerlm.data.mixture import Mixture, rotation
from summerlm.data.permutation import keyed_bits

ROWS = 4000
WEIGHTS = [[60, 20, 10, 5, 5], [1, 1], [91, 6, 2, 1], [0.7, 0.3], [1] * 7, [503, 211, 17], [1]]
WEIGHTS += [np.random.default_rng(i).integers(1, 1000, 2 + i % 4).tolist() for i in range(4)]


def circle(lanes, seed):
    """Where every row of every lane falls on the circle, (ROWS, lanes), uint64."""
    k, g = rotation(lanes)
    angle = Fraction(k + Fraction(0x9E3779B97F4A7C15, 1 << 64), lanes)
    start = keyed_bits("mixture", seed)
    turned = np.arange(ROWS, dtype=np.uint64) * np.uint64(int(angle * (1 << 64)) % (1 << 64))
    spread = np.array([(g * lane % lanes << 64) // lanes for lane in range(lanes)], np.uint64)
    return turned[:, None] + spread + start  # arrays wrap


def unevenness(points, weights):
    """Most rows by which a source is off its share: in any lane's rows, in any global prefix."""
    total, before, lane_worst, prefix_worst = sum(weights), 0, 0.0, 0.0
    for weight in weights:
        low, high = (before << 64) // total, ((before + weight) << 64) // total - 1
        share, before = float(weight / total), before + weight
        hit = (points >= np.uint64(low)) & (points <= np.uint64(high))
        in_lane = np.cumsum(hit, 0) - share * np.arange(1, ROWS + 1)[:, None]
        overall = np.cumsum(hit.ravel()) - share * np.arange(1, hit.size + 1)
        lane_worst = max(lane_worst, np.abs(in_lane).max())
        prefix_worst = max(prefix_worst, np.abs(overall).max())
    return lane_worst, prefix_worst


def check_even(lanes):
    for seed, weights in enumerate(WEIGHTS):
        exact = [int(Fraction(w) * 2**60) for w in weights]
        in_lane, in_prefix = unevenness(circle(lanes, seed), exact)
        assert in_lane < 8, (lanes, weights, in_lane)
        assert in_prefix < 6.6, (lanes, weights, in_prefix)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 1 << 40), st.data())
def test_equals_the_formula(lanes, seed, data):
    lanes += lanes == 7  # which is refused
    weights = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
    row, lane = data.draw(st.integers(0, ROWS - 1)), data.draw(st.integers(0, lanes - 1))
    position = Fraction(int(circle(lanes, seed)[row, lane]), 1 << 64)
    end, expected = Fraction(0), None
    for index, weight in enumerate(weights):
        end += Fraction(weight) / sum(map(Fraction, weights))
        if expected is None and position < end:
            expected = index
    assert Mixture(weights, lanes, seed).source(lane, row) == expected


@pytest.mark.parametrize("lanes", [*range(1, 7), *range(8, 34), 48, 64, 96, 144, 233, 240])
def test_every_lane_and_every_prefix_is_even(lanes):
    check_even(lanes)


@pytest.mark.parametrize("lanes", [480, 960])
def test_many_lanes_are_even(lanes):
    in_lane, in_prefix = unevenness(circle(lanes, 3), [60, 20, 10, 5, 5])
    assert in_lane < 8
    assert in_prefix < 6.6


@pytest.mark.slow
def test_all_lane_counts_are_even():
    for lanes in range(1, 257):
        if lanes != 7:
            check_even(lanes)


def test_a_lane_count_without_an_even_rotation_is_refused():
    with pytest.raises(UsageError, match=r"data\.lanes = 7"):
        Mixture([1, 1], 7, 0)


@pytest.mark.slow
def test_seven_is_the_only_lane_count_refused():
    refused = []
    for lanes in range(1, 1025):
        try:
            rotation(lanes)
        except UsageError:
            refused.append(lanes)
    assert refused == [7]


@pytest.mark.parametrize("lanes", [1, 2, 9, 48, 960, 4096])
def test_the_rotation_lets_no_two_lanes_coincide(lanes):
    k, g = rotation(lanes)
    assert gcd(k, lanes) == gcd(g, lanes) == 1
    assert 1 <= k <= lanes
    assert 1 <= g <= lanes


def test_only_the_ratio_of_weights_counts():
    a, b, c = (Mixture(w, 8, 3) for w in ([0.75, 0.25], [3, 1], [300.0, 100.0]))
    drawn = [[m.source(lane, row) for row in range(99) for lane in range(8)] for m in (a, b, c)]
    assert drawn[0] == drawn[1] == drawn[2]


def test_the_seed_turns_the_circle():
    drawn = {tuple(Mixture([2, 1], 3, seed).source(0, r) for r in range(50)) for seed in range(9)}
    assert len(drawn) > 5
