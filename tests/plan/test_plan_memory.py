"""Extending and dealing out of memory, by hand and by property."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan_count import SMALL, SUMMER_4B

from summerlm.model.config import ModelConfig
from summerlm.plan.count import parameters
from summerlm.plan.memory import KINDS, Sharing, extend, share_out, spread

PEAKS = {
    "state": {"weights": 100, "optimizer": 200},
    "loss": {"weights": 100, "optimizer": 200, "activations": 900, "loss": 50},
    "update": {"weights": 100, "optimizer": 200, "gradients": 100, "workspace": 10},
}


def test_the_highest_moment_is_told_by_part():
    found = spread(PEAKS, Sharing())
    assert (found.stretch, found.total) == ("loss", 1250)
    assert (found.weights, found.activations, found.gradients) == (100, 900, 0)


def test_shards_hold_parts_and_borrow_the_rest():
    found = spread(PEAKS, Sharing(4, 0.25, lent=40, whole_gradients=60, spared=400))
    assert (found.weights, found.optimizer, found.gathered) == (25, 50, 100)
    assert found.activations == 500
    assert found.total == 25 + 50 + 100 + 500 + 50


def test_a_part_without_a_name_is_an_error():
    with pytest.raises(AssertionError, match="without a name"):
        spread({"loss": {"novelty": 1}}, Sharing())


@given(st.dictionaries(st.sampled_from(KINDS), st.integers(0, 10**12), min_size=1))
def test_nothing_is_lost_or_added(kinds):
    assert spread({"loss": kinds}, Sharing()).total == sum(kinds.values())


def test_layers_add_alike():
    deep = extend({"a": {"x": 10, "y": 3}}, {"a": {"x": 14, "y": 3}}, more=28)
    assert deep == {"a": {"x": 14 + 28 * 4, "y": 3}}


def test_share_out_by_hand():
    config = ModelConfig(**SMALL)  # width 48, 3 layers
    D, E = 48, 16
    block = D * (4 + 8) * E + 4 * E * D + 3 * D * 100 + 2 * D + 2 * E
    root = 2 * 256 * D + D
    found = share_out(config, 2, 2, micro_batches=1)
    assert found.lent == 4 * root + 2 * 2 * block
    assert found.whole_gradients == 4 * root + block * 8
    assert found.spared == 3 * 2 * block
    assert share_out(config, 2, 2, 4).whole_gradients == 4 * parameters(config, padded=True)
    assert share_out(config, 2, 4, 1).spared == 0, "float32 makes no copies"
    assert found.share == 0.5
    # rows that five can't share evenly: the first holds 10 of 48, 52 of 256, 40 of 200, 39 of 192
    total = parameters(config, padded=True)
    held = 2 * 52 * D + 10 + 3 * (2 * 10 + 2 * 4 + 39 * D + 10 * 4 * E + 40 * D + 10 * 100)
    assert share_out(config, 5, 2, 1).share == held / total
    assert share_out(config, 1, 2, 4) == Sharing()


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_twice_the_shards_hold_half(shards):
    few = share_out(SUMMER_4B, shards, 2, 1).share
    assert share_out(SUMMER_4B, 2 * shards, 2, 1).share == pytest.approx(few / 2, rel=1e-3)
