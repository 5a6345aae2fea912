import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from summerlm.optim.config import OptimConfig
from summerlm.optim.schedule import extendable_from, rate_factor

STEP, WARMUP, BUDGET = 131_072, 262_144_000, 610_352 * 131_072  # the original's
FAITHFUL = OptimConfig(
    name="adamw", peak_lr=1e-4, schedule="cosine", warmup_tokens=WARMUP, floor_ratio=0.01
)
SCHEDULES = ["cosine", "wsd", "constant"]
configs = st.builds(
    OptimConfig,
    schedule=st.sampled_from(SCHEDULES),
    warmup_tokens=st.integers(0, 2000),
    cooldown_fraction=st.floats(0.01, 1),
    floor_ratio=st.floats(0, 1),
)


def rate(step, config=FAITHFUL):
    """Rate of the step that ends after `step` steps of the original's size."""
    return config.peak_lr * rate_factor(config, step * STEP, BUDGET)


def test_the_faithful_numbers():
    assert BUDGET == 80_000_057_344  # 80.0B
    assert rate(0) == 0
    assert rate(1) == pytest.approx(1e-4 / 2000)
    assert rate(1000) == pytest.approx(5e-5)
    assert rate(2000) == pytest.approx(1e-4)
    assert rate((2000 + 610_352) // 2) == pytest.approx((1e-4 + 1e-6) / 2)
    quarter = 2000 + (610_352 - 2000) // 4
    assert rate(quarter) == pytest.approx(1e-6 + 0.99e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(610_351) == pytest.approx(1e-6, rel=1e-4)
    assert rate(610_352) == pytest.approx(1e-6, rel=1e-12)


def test_cosine_stays_at_the_floor_where_the_original_climbs_again():
    for step in (610_353, 900_000, 1_218_704, 10**7):
        assert rate(step) == pytest.approx(1e-6, rel=1e-12)


def test_warmup_stable_decay():
    config = OptimConfig(warmup_tokens=100, cooldown_fraction=0.4, floor_ratio=0.1)
    expected = {0: 0, 1: 0.01, 50: 0.5, 100: 1, 101: 1, 600: 1, 601: 1 - 0.9 / 400}
    expected |= {800: 0.55, 999: 0.1 + 0.9 / 400, 1000: 0.1, 1001: 0.1, 5000: 0.1}
    assert {t: rate_factor(config, t, 1000) for t in expected} == pytest.approx(expected)


def test_constant_holds_its_peak():
    config = OptimConfig(schedule="constant", warmup_tokens=100, floor_ratio=0.1)
    assert [rate_factor(config, t, 1000) for t in (0, 25, 100, 1000, 9999)] == [0, 0.25, 1, 1, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_warmup_begins_at_the_peak(schedule):
    assert rate_factor(OptimConfig(schedule=schedule), 1, 10**9) == pytest.approx(1)


@given(configs, st.integers(1, 3000))
def test_one_rise_one_fall_within_bounds(config, budget):
    factors = [rate_factor(config, tokens, budget) for tokens in range(0, 4000, 7)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert rate_factor(config, 1, budget) > 0 or config.floor_ratio == 0
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


@given(configs, st.integers(1, 3000), st.integers(0, 3000))
def test_the_extendable_part_is_the_same_for_every_larger_budget(config, budget, more):
    last = extendable_from(config, budget)
    if last is None:
        assert config.schedule == "cosine"
        return
    assert last <= budget
    for tokens in {0, last // 2, max(0, last - 1), last}:
        assert rate_factor(config, tokens, budget) == rate_factor(config, tokens, budget + more)


def test_the_extendable_part_ends_where_the_rate_first_falls():
    wsd = OptimConfig(warmup_tokens=10, cooldown_fraction=0.3, floor_ratio=0.5)
    last = extendable_from(wsd, 1001)
    assert rate_factor(wsd, last, 1001) == 1 > rate_factor(wsd, last + 1, 1001)
    assert extendable_from(wsd.model_copy(update={"schedule": "constant"}), 1001) == 1001
    assert extendable_from(wsd.model_copy(update={"schedule": "cosine"}), 1001) is None
